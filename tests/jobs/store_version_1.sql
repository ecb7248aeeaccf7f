-- A store as version 1 wrote it: two fine-tuning jobs, of the kind that was then called
-- finetune, and a recipe.
BEGIN TRANSACTION;
CREATE TABLE anabranch_schema (
  version INTEGER NOT NULL
);
INSERT INTO "anabranch_schema" VALUES(1);
CREATE TABLE artefacts (
  job_id VARCHAR(64) NOT NULL,
  name VARCHAR(255) NOT NULL,
  path TEXT NOT NULL,
  size BIGINT NOT NULL,
  sha256 VARCHAR(64) NOT NULL,
  PRIMARY KEY (job_id, name)
);
INSERT INTO "artefacts" VALUES('ftjob-111111111111111111111111','adapter','/state/jobs/ftjob-1/versions/1',12345,'');
CREATE TABLE events (
  job_id VARCHAR(64) NOT NULL,
  sequence INTEGER NOT NULL,
  time FLOAT NOT NULL,
  level VARCHAR(8) NOT NULL,
  kind VARCHAR(32) NOT NULL,
  message TEXT NOT NULL,
  data JSON NOT NULL,
  PRIMARY KEY (job_id, sequence)
);
INSERT INTO "events" VALUES('ftjob-111111111111111111111111',1,1700000002.0,'info','message','Created fine-tuning job: ftjob-111111111111111111111111','{}');
INSERT INTO "events" VALUES('ftjob-111111111111111111111111',2,1700000006.0,'info','metrics','Step 2/24: training loss=2.5000','{"step": 2, "train_loss": 2.5}');
INSERT INTO "events" VALUES('ftjob-111111111111111111111111',3,1700000008.0,'info','message','The job has successfully completed','{}');
CREATE TABLE files (
  id VARCHAR(64) NOT NULL,
  owner VARCHAR(64),
  filename TEXT NOT NULL,
  purpose VARCHAR(32) NOT NULL,
  size BIGINT NOT NULL,
  sha256 VARCHAR(64) NOT NULL,
  created FLOAT NOT NULL,
  PRIMARY KEY (id)
);
CREATE TABLE jobs (
  id VARCHAR(64) NOT NULL,
  kind VARCHAR(32) NOT NULL,
  target VARCHAR(255) NOT NULL,
  name VARCHAR(255) NOT NULL,
  owner VARCHAR(64),
  state VARCHAR(16) NOT NULL,
  wanted VARCHAR(16) NOT NULL,
  priority INTEGER NOT NULL,
  spec JSON NOT NULL,
  progress JSON NOT NULL,
  error TEXT,
  created FLOAT NOT NULL,
  started FLOAT,
  finished FLOAT,
  lease VARCHAR(255),
  beat FLOAT,
  num_events INTEGER NOT NULL,
  PRIMARY KEY (id)
);
INSERT INTO "jobs" VALUES('ftjob-111111111111111111111111','finetune','smollm2','mine','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','succeeded','run',0,'{"model": "smollm2", "base": "smollm2", "base_fingerprint": "0000000000000000000000000000000000000000000000000000000000000000", "adapter": "mine", "start_from": null, "training_file": "file-1", "validation_file": null, "rows": 8, "validation_rows": 0, "method": "lora", "method_options": {"r": 16}, "options": {}, "hyperparameters": {"n_epochs": 3}, "weight": 1.0, "publish_every": null, "metadata": {}}','{"step": 2, "total_steps": 24, "loss": 2.5}',NULL,1700000001.0,1700000004.0,1700000007.0,NULL,NULL,3);
INSERT INTO "jobs" VALUES('ftjob-222222222222222222222222','finetune','smollm2','other',NULL,'queued','run',0,'{"model": "smollm2", "base": "smollm2", "base_fingerprint": "0000000000000000000000000000000000000000000000000000000000000000", "adapter": "other", "start_from": null, "training_file": "file-1", "validation_file": null, "rows": 8, "validation_rows": 0, "method": "lora", "method_options": {"r": 16}, "options": {}, "hyperparameters": {"n_epochs": 3}, "weight": 1.0, "publish_every": null, "metadata": {}}','{}',NULL,1700000009.0,NULL,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES('job-33333333333333333333333333333333','finetune','','arithmetic',NULL,'queued','run',0,'{"recipe": "arithmetic", "overrides": []}','{}',NULL,1700000010.0,NULL,NULL,NULL,NULL,0);
CREATE INDEX jobs_by_turn ON jobs (kind, state, priority, created);
CREATE INDEX jobs_by_lease ON jobs (lease);
CREATE INDEX jobs_by_age ON jobs (kind, owner, created, id);
CREATE INDEX jobs_by_name ON jobs (kind, target, name);
CREATE INDEX events_by_kind ON events (job_id, kind, sequence);
CREATE INDEX files_by_age ON files (owner, created, id);
COMMIT;
