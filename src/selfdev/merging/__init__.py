"""From a seed and experts to a merged model: task vectors, and writing them into a resident model."""
