"""How good a merged model is: tasks, and the scoring of their questions."""
