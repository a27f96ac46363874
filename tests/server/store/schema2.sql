-- Version 2 of the schema, as server/store/migrations/versions/ made it, with a reply of two answers.
CREATE TABLE posterior_schema (version_num VARCHAR(32) NOT NULL, CONSTRAINT posterior_schema_pkc PRIMARY KEY (version_num));
INSERT INTO posterior_schema VALUES ('2');
CREATE TABLE posterior_replies (
    owner VARCHAR(64) NOT NULL, id VARCHAR(256) NOT NULL, created DOUBLE PRECISION NOT NULL, model VARCHAR NOT NULL,
    posterior VARCHAR, hash VARCHAR, base VARCHAR NOT NULL, request JSON, PRIMARY KEY (owner, id)
);
CREATE INDEX posterior_replies_created ON posterior_replies (created);
CREATE TABLE posterior_answers (
    owner VARCHAR(64) NOT NULL, id VARCHAR(256) NOT NULL, item INTEGER NOT NULL, kind VARCHAR NOT NULL,
    predictive VARCHAR NOT NULL, particles INTEGER NOT NULL, dtype VARCHAR NOT NULL, key JSON, options JSON,
    probability JSON, best INTEGER, confidence DOUBLE PRECISION, calibrated BOOLEAN NOT NULL,
    max_risk DOUBLE PRECISION, refusal VARCHAR, familiarity DOUBLE PRECISION, total DOUBLE PRECISION,
    epistemic DOUBLE PRECISION, prediction_set JSON, coverage DOUBLE PRECISION, features JSON,
    PRIMARY KEY (owner, id, item),
    FOREIGN KEY (owner, id) REFERENCES posterior_replies (owner, id) ON DELETE CASCADE
);
CREATE TABLE posterior_outcomes (
    owner VARCHAR(64) NOT NULL, id VARCHAR(256) NOT NULL, item INTEGER NOT NULL, reported DOUBLE PRECISION NOT NULL,
    truth INTEGER, correct BOOLEAN NOT NULL, PRIMARY KEY (owner, id, item),
    FOREIGN KEY (owner, id, item) REFERENCES posterior_answers (owner, id, item) ON DELETE CASCADE
);
INSERT INTO posterior_replies (owner, id, created, model, posterior, hash, base) VALUES
    ('aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'pred-1', 1790000000.5, 'gang', 'gang', 'hash', 'base');
INSERT INTO posterior_answers
    (owner, id, item, kind, predictive, particles, dtype, options, probability, best, confidence, calibrated)
VALUES
    ('aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'pred-1', 0, 'answers', 'mixture', 8, 'bfloat16',
     '[" no", " yes"]', '[0.25, 0.75]', 1, 0.75, FALSE),
    ('aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'pred-1', 1, 'answers', 'mixture', 8, 'bfloat16',
     '[" no", " yes"]', '[0.5, 0.5]', 0, 0.5, FALSE);
INSERT INTO posterior_outcomes VALUES
    ('aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'pred-1', 0, 1790000001.5, 1, TRUE);
