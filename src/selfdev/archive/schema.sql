-- One run, one file. A row is committed before it is reported; columns named `seconds`, `screening`, `created` or
-- `opened` are clock readings and the only ones in which a resumed run may differ from an unbroken one.

CREATE TABLE run (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    name TEXT NOT NULL,
    preset TEXT NOT NULL,
    seed INTEGER NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('running', 'verdict', 'done')),
    config TEXT NOT NULL,             -- JSON, complete
    facts TEXT NOT NULL,              -- JSON: hashes of weights, versions
    created TEXT NOT NULL,
    seconds REAL NOT NULL             -- spent in all sessions
) STRICT;

CREATE TABLE question (
    split TEXT NOT NULL,
    position INTEGER NOT NULL,        -- the order of every `outcomes` of this split
    question TEXT NOT NULL,           -- content hash
    grp TEXT NOT NULL,
    PRIMARY KEY (split, position)
) STRICT;

CREATE TABLE iteration (
    arm TEXT NOT NULL,
    iteration INTEGER NOT NULL,       -- from 0
    temperature REAL NOT NULL,
    prompts TEXT NOT NULL,            -- JSON: the texts
    seconds REAL NOT NULL,            -- sampling
    PRIMARY KEY (arm, iteration)
) STRICT;

CREATE TABLE candidate (
    name TEXT PRIMARY KEY,            -- arm/iteration/index, counted from 1
    arm TEXT NOT NULL,
    iteration INTEGER NOT NULL,
    number INTEGER NOT NULL,          -- index within the iteration, from 0
    prompt INTEGER NOT NULL,          -- index into iteration.prompts
    text TEXT NOT NULL,
    tokens BLOB NOT NULL,             -- sampled ids, int32
    log_prob REAL,                    -- nats, at temperature 1; of all tokens
    finished INTEGER NOT NULL,
    source TEXT,                      -- in the contract's form; NULL if no function could be read
    status TEXT CHECK (status IN ('failed', 'trivial', 'known', 'repeated', 'new')),  -- NULL: not screened yet
    failure TEXT,                     -- a class
    error TEXT,
    canonical TEXT,
    behaviour BLOB,
    nearest TEXT,                     -- what it is, or the nearest trivial or known program
    distance REAL,                    -- to that, relative
    seconds REAL,                     -- from its first token to its last, those beside it included; NULL: unknown
    screening REAL,                   -- seconds that the screening took; NULL: unknown
    log_probs BLOB,                   -- of each token, float32; NULL: unknown
    UNIQUE (arm, iteration, number)
) STRICT;

CREATE TABLE evaluation (
    kind TEXT NOT NULL CHECK (kind IN ('seed', 'rival', 'candidate', 'scaled')),
    subject TEXT NOT NULL,            -- seed, method or candidate
    number INTEGER NOT NULL,          -- which setting of a rival, which factor of a scaled candidate; 0 elsewhere
    split TEXT NOT NULL,
    parameters TEXT NOT NULL,         -- JSON: a rival's setting, or what was measured beside a candidate's score
    score REAL,                       -- 0..1; NULL with a failure: invalid is a status, never a number
    outcomes BLOB,                    -- one bit a question, or a float64 where they are graded
    questions INTEGER NOT NULL,       -- on how many the score rests
    failure TEXT,
    seconds REAL NOT NULL,
    graded INTEGER NOT NULL DEFAULT 0,
    asked BLOB,                       -- int32: positions of the questions in the order of the outcomes; NULL: all
    first_questions INTEGER,          -- of a race: its first prefix, which all entrants answered ...
    first_score REAL,                 -- ... and the score on it
    PRIMARY KEY (kind, subject, number, split)
) STRICT;

CREATE TABLE pair (
    arm TEXT NOT NULL,
    iteration INTEGER NOT NULL,
    position INTEGER NOT NULL,
    chosen TEXT NOT NULL REFERENCES candidate (name),
    rejected TEXT NOT NULL REFERENCES candidate (name),
    reason TEXT NOT NULL,             -- why the rejected side is rejected
    PRIMARY KEY (arm, iteration, position)
) STRICT;

CREATE TABLE refinement (
    arm TEXT NOT NULL,
    iteration INTEGER NOT NULL,       -- the one whose pairs it learned from
    adapter TEXT,                     -- folder within the run; NULL if the round was skipped
    facts TEXT NOT NULL,              -- JSON: pairs, reference, refit, losses, why skipped
    seconds REAL NOT NULL,
    PRIMARY KEY (arm, iteration)
) STRICT;

CREATE TABLE test_opening (
    number INTEGER PRIMARY KEY,
    task TEXT NOT NULL,
    opened TEXT NOT NULL,
    again INTEGER NOT NULL DEFAULT 0, -- 1: after a verdict, which --again took back ...
    before TEXT                       -- ... JSON: its result
) STRICT;

CREATE TABLE verdict (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    fixed TEXT NOT NULL,              -- JSON: best candidate and best rival on development, before the opening
    result TEXT                       -- JSON; NULL until it is reached
) STRICT;
