//! What a journal holds after everything a disk can do to it.

mod media;

use std::sync::Arc;

use peapod_proto::ids::{Epoch, Generation, SampleName, ShardId, Step, WorkerId};

use super::*;
use crate::core::order::Source;
use crate::core::{Config, Core, Outcome};
use media::Media;

fn state() -> State {
    let config = Config {
        world_size: 1,
        min_world_size: 1,
        workers_are_alike: false,
        global_batch: 16,
        scale_batch: false,
        heartbeat_timeout: Duration::from_secs(3),
        join_timeout: Duration::from_secs(60),
        data_patience: Duration::from_secs(60),
        job_id: "job".into(),
        job_toml: String::new(),
        seed: 1,
        shards: Arc::new(["a.tar".into()]),
        sources: Arc::new([Source::unnamed(1)]),
        epochs: Some(1),
        last_step: None,
        checkpoint_every: Duration::from_secs(60),
        max_bad_fraction: 0.1,
        max_skipped_steps: 1,
    };
    Core::new(config, None).durable()
}

fn run() -> Run {
    Run { job_id: "7".into(), term: 3, world_size: 1, job: "toml".into(), shards: "digest".into() }
}

fn commit(step: u32) -> Fact {
    let name = SampleName { epoch: Epoch(0), shard: ShardId(0), index: step };
    Fact::Commit { step: Step(step.into()), generation: Generation(1), names: vec![name], skipped: false }
}

fn reopen(path: &Path) -> Found {
    Disk::open(path).unwrap().1.unwrap()
}

#[test]
fn facts_are_found_again_and_those_that_may_be_late_come_with_the_next_that_may_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal.redb");
    let (mut journal, found) = Disk::open(&path).unwrap();
    assert_eq!(found, None);
    journal.begin(&run(), &state()).unwrap();
    journal.append(&commit(1)).unwrap();
    assert!(journal.flush_at().is_some_and(|at| at <= Instant::now() + LATEST));
    drop(journal);
    assert_eq!(reopen(&path), Found { run: run(), state: state() }, "it was not on disk yet");

    let (mut journal, _) = Disk::open(&path).unwrap();
    journal.append(&commit(1)).unwrap();
    journal.append(&Fact::Joined(WorkerId(1))).unwrap();
    assert_eq!(journal.flush_at(), None);
    journal.append(&commit(2)).unwrap();
    journal.flush().unwrap();
    drop(journal);
    let mut expected = state();
    for fact in [commit(1), Fact::Joined(WorkerId(1)), commit(2)] {
        expected.apply(fact).unwrap();
    }
    assert_eq!(reopen(&path).state, expected);
    assert_eq!(reopen(&path).state, expected, "reading changes nothing");
}

#[test]
fn snapshot_stands_for_the_facts_before_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal.redb");
    let (mut journal, _) = Disk::open(&path).unwrap();
    journal.begin(&run(), &state()).unwrap();
    let mut expected = state();
    for step in 1..=3 {
        journal.append(&commit(step)).unwrap();
        expected.apply(commit(step)).unwrap();
    }
    assert!(!journal.is_long());
    journal.append(&Fact::Checkpoint(Step(3))).unwrap();
    assert!(journal.is_long());
    journal.compact(&expected).unwrap();
    assert!(!journal.is_long() && journal.flush_at().is_none());
    journal.append(&commit(4)).unwrap();
    journal.append(&Fact::Ended(Outcome::Finished)).unwrap();
    drop(journal);
    expected.apply(commit(4)).unwrap();
    expected.apply(Fact::Ended(Outcome::Finished)).unwrap();
    let found = reopen(&path);
    assert_eq!((found.state.outcome(), &found.state), (Some(&Outcome::Finished), &expected));
}

#[test]
fn journal_of_no_use_is_named_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal.redb");
    let refused = |path: &Path| Disk::open(path).unwrap_err().to_string();
    std::fs::write(&path, b"no journal").unwrap();
    let error = refused(&path);
    assert!(error.contains("journal.redb cannot be opened: ") && error.ends_with("move this file away"), "{error}");
    assert!(refused(&folder.path().join("nowhere/journal.redb")).contains("cannot be opened: "));

    // Facts that contradict each other are damage, too.
    std::fs::remove_file(&path).unwrap();
    let (mut journal, _) = Disk::open(&path).unwrap();
    journal.begin(&run(), &state()).unwrap();
    journal.append(&commit(1)).unwrap();
    journal.append(&commit(1)).unwrap();
    journal.flush().unwrap();
    drop(journal);
    let error = refused(&path);
    assert!(error.contains("journal.redb is damaged: fact 1: sample 0/0/1 was trained twice"), "{error}");

    // One of another version is none; nothing else of it need be as here.
    let database = Database::open(&path).unwrap();
    let transaction = database.begin_write().unwrap();
    transaction.open_table(RUN).unwrap().insert(ONLY, "{\"format\":7}").unwrap();
    transaction.commit().unwrap();
    drop(database);
    let error = refused(&path);
    assert!(error.contains("is of another version of this program (its format is 7, this one reads 3): end its job with"), "{error}");
}

#[test]
fn second_process_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal.redb");
    let _first = Disk::open(&path).unwrap();
    assert!(Disk::open(&path).is_err());
}

/// What is written down in a run, in order: some may be late, some not, and now and then a snapshot takes their place.
fn script() -> Vec<Fact> {
    (1..=24)
        .map(|number| match number % 4 {
            0 => Fact::Checkpoint(Step(number.into())),
            2 => Fact::Joined(WorkerId(number.into())),
            _ => commit(number),
        })
        .collect()
}

/// Writes the script until the disk fails. Returns how many facts would survive for certain, and how many may; nothing if the run had not
/// begun.
fn write_script(media: &Media) -> (Option<usize>, Option<usize>) {
    let Ok(database) = Database::builder().create_with_backend(media.clone()) else { return (None, None) };
    let Ok((mut journal, _)) = Disk::read(database, Path::new("journal.redb")) else { return (None, None) };
    let mut expected = state();
    if let Err(error) = journal.begin(&run(), &expected) {
        let text = error.to_string();
        assert!(text.starts_with("the journal journal.redb cannot be written: ") && text.ends_with("goes on with the job"), "{text}");
        return (None, Some(0));
    }
    let mut certain = 0;
    for (number, fact) in script().into_iter().enumerate() {
        let tried = Some(number + 1);
        expected.apply(fact.clone()).unwrap();
        let must_not_be_late = !fact.may_be_late();
        if journal.append(&fact).is_err() {
            return (Some(certain), tried);
        }
        if must_not_be_late {
            certain = number + 1;
        }
        if journal.is_long() {
            if journal.compact(&expected).is_err() {
                return (Some(certain), tried);
            }
            certain = number + 1;
        }
    }
    assert!(journal.flush().is_ok() || media.has_failed());
    (Some(certain), Some(script().len()))
}

/// That what is found after a failure is what was written up to some fact, with nothing missing that was said to be safe.
fn assert_some_prefix(media: Media, (certain, tried): (Option<usize>, Option<usize>), what: &str) {
    let opened = Database::builder().create_with_backend(media).map_err(|error| error.to_string());
    let found = match opened.and_then(|database| Disk::read(database, Path::new("journal.redb")).map_err(|error| error.to_string())) {
        Ok((_, found)) => found,
        // A file that was never whole may be of no use: there is nothing in it.
        Err(_) if certain.is_none() => return,
        Err(error) => panic!("{what}: {error}"),
    };
    let Some(found) = found else {
        assert_eq!(certain, None, "{what}: the run is gone");
        return;
    };
    let tried = tried.unwrap_or_else(|| panic!("{what}: a run that nobody began"));
    let mut expected = state();
    let mut states = vec![expected.clone()];
    for fact in script() {
        expected.apply(fact).unwrap();
        states.push(expected.clone());
    }
    let possible = certain.unwrap_or(0)..=tried;
    assert!(states[possible.clone()].contains(&found.state), "{what}: not what was written up to one of the facts {possible:?}");
}

#[test]
fn writes_torn_at_any_point_leave_what_was_written_up_to_some_fact() {
    let whole = Media::new(usize::MAX);
    assert_eq!(write_script(&whole), (Some(24), Some(24)));
    let num_operations = whole.num_operations();
    assert!(num_operations > 100, "{num_operations}");
    for operation in 0..num_operations {
        let media = Media::new(operation);
        let written = write_script(&media);
        assert!(media.has_failed());
        for seed in 0..4 {
            assert_some_prefix(media.after_power_failure(seed), written, &format!("power lost at operation {operation}, seed {seed}"));
        }
        assert_some_prefix(media.as_written(), written, &format!("process killed, or disk full, at operation {operation}"));
    }
}

#[test]
fn closed_journal_is_looked_into_and_one_that_was_never_closed_is_known_as_such() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(JOURNAL);
    assert_eq!(look(&path), None);
    let (mut journal, _) = Disk::open(&path).unwrap();
    journal.begin(&run(), &state()).unwrap();
    journal.append(&commit(1)).unwrap();
    journal.append(&Fact::Ended(Outcome::Finished)).unwrap();
    assert_eq!(look(&path), None, "it is open");
    // As a coordinator that is killed leaves it.
    let copy = folder.path().join("killed.redb");
    std::fs::copy(&path, &copy).unwrap();
    let bytes = std::fs::read(&copy).unwrap();
    assert_eq!((look(&copy), std::fs::read(&copy).unwrap()), (Some(Closed::CutShort), bytes));
    drop(journal);
    let Some(Closed::Whole(found)) = look(&path) else { panic!("it is closed") };
    assert_eq!((found.run, found.state.final_step(), found.state.outcome()), (run(), Step(1), Some(&Outcome::Finished)));
    std::fs::write(&path, "no journal").unwrap();
    assert_eq!(look(&path), None);
}
