//! When a validation is believed.

use super::*;

#[test]
fn validation_is_believed_when_the_step_that_carried_it_is_final() {
    let (mut world, workers) = World::running(2);
    world.report(workers[0], 1, Some(&[]));
    world.report(workers[1], 1, None);
    let mut record = world.record(2, &[]);
    record.validation = Some(losses(1));
    let report =
        StepReport { generation: Generation(1), step: Step(2), record: Some(record), timings: StepTimings::default(), snapshot: None };
    world.say(workers[0], FromWorker::StepReport(report)).unwrap();
    assert_eq!((world.validated(), world.core.validation()), (vec![], None), "step 2 may still be void");
    world.report(workers[1], 2, None);
    assert_eq!((world.validated(), world.core.validation()), (vec![1], Some(losses(1))));
}

#[test]
fn validation_that_a_death_made_the_members_repeat_is_said_once() {
    // Member 0 held the sum that carries it and died; what member 1 holds decides.
    let (mut world, workers) = World::running(2);
    world.report(workers[0], 1, Some(&[]));
    world.report(workers[1], 1, None);
    let mut record = world.record(2, &[]);
    record.validation = Some(losses(1));
    let report =
        StepReport { generation: Generation(1), step: Step(2), record: Some(record), timings: StepTimings::default(), snapshot: None };
    world.say(workers[0], FromWorker::StepReport(report)).unwrap();
    world.die(workers[0]);
    world.stopped(workers[1], 1, StopCause::Aborted, vec![]);
    assert_eq!(world.validated(), [0; 0]);
    let newcomer = world.join(None).unwrap();
    world.ready(newcomer);
    world.bootstrap(newcomer);
    let mut record = world.record(2, &[]);
    record.validation = Some(losses(1));
    world.stopped(newcomer, 2, StopCause::Planned, vec![record.clone()]);
    world.stopped(workers[1], 2, StopCause::Planned, vec![record]);
    assert_eq!(world.validated(), [1]);
}

#[test]
fn validation_of_the_last_step_comes_with_the_word_of_whoever_holds_it() {
    let (mut world, workers) = World::running(2);
    let record = world.record(100, &[]);
    let records: Vec<StepRecord> = (1..100).map(|step| world.record(step, &[])).chain([record]).collect();
    world.stopped_with(workers[0], 100, StopCause::StepsDone, records, "", None);
    world.stopped_with(workers[1], 100, StopCause::StepsDone, vec![], "", Some(losses(100)));
    assert_eq!(world.validated(), [100]);
    world.event(Event::CheckpointStored { step: Step(100), generation: Generation(1) }).unwrap();
    assert_eq!(world.outcome(), Some(Outcome::Finished));
}

#[test]
fn validation_of_steps_that_are_lost_is_forgotten_and_said_again() {
    let (mut world, workers) = World::running(1);
    world.report_with(workers[0], 1, Some(&[]), Some(1)).unwrap();
    world.event(Event::CheckpointStored { step: Step(1), generation: Generation(1) }).unwrap();
    world.report(workers[0], 2, Some(&[]));
    let validated = |world: &mut World, worker: WorkerId, step: u64| {
        let mut record = world.record(step + 1, &[]);
        record.validation = Some(losses(step));
        let (generation, timings) = (world.core.generation(), StepTimings::default());
        let report = StepReport { generation, step: Step(step + 1), record: Some(record), timings, snapshot: None };
        world.say(worker, FromWorker::StepReport(report)).unwrap();
    };
    validated(&mut world, workers[0], 2);
    world.die(workers[0]);
    let newcomer = world.join(Some(0)).unwrap();
    world.ready(newcomer);
    world.pass(3, &[newcomer]);
    assert_eq!(world.core.validation(), None, "step 2 is void");
    world.bootstrap(newcomer);
    world.report(newcomer, 2, Some(&[]));
    validated(&mut world, newcomer, 2);
    assert_eq!(world.validated(), [2, 2]);
}

#[test]
fn later_validation_takes_the_place_of_an_earlier_one_and_none_is_said_twice() {
    let (mut world, workers) = World::running(1);
    for (step, validated) in [(1, 1), (2, 2), (3, 2), (4, 1)] {
        let record = StepRecord { validation: Some(losses(validated)), ..world.record(step, &[]) };
        let (generation, timings) = (Generation(1), StepTimings::default());
        let report = StepReport { generation, step: Step(step), record: Some(record), timings, snapshot: None };
        world.say(workers[0], FromWorker::StepReport(report)).unwrap();
    }
    assert_eq!((world.validated(), world.core.validation()), (vec![1, 2], Some(losses(2))));
}
