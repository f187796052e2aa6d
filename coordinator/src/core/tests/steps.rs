//! Which steps are final, and whose samples count.

use super::*;

#[test]
fn step_is_final_when_all_reported_it_or_one_reported_the_next() {
    let (mut world, workers) = World::running(2);
    let (leases, _) = world.lease(workers[0], 1);
    let shard = leases[0].shard;
    world.report(workers[0], 1, Some(&names(0, shard, 0..2)));
    assert_eq!(world.core.final_step(), Step(0));
    world.report(workers[1], 1, None);
    assert_eq!((world.core.final_step(), world.core.ledger().totals().committed), (Step(1), 2));
    world.report(workers[0], 2, Some(&names(0, shard, 2..3)));
    world.report(workers[0], 3, Some(&names(0, shard, 3..4)));
    assert_eq!(world.core.final_step(), Step(2), "step 3 was entered, so all had applied 2");
}

#[test]
fn final_step_waits_for_its_record() {
    let (mut world, workers) = World::running(2);
    world.report(workers[1], 1, None);
    world.report(workers[1], 2, None);
    assert_eq!(world.core.final_step(), Step(0), "member 0's names of step 1 are still on their way");
    world.report(workers[0], 1, Some(&[]));
    assert_eq!(world.core.final_step(), Step(1));
}

#[test]
fn source_decides_an_all_reduce_that_finished_on_some_ranks_only() {
    // Members 0 and 1 applied step 2 and reported it; member 2 failed in it and member 0 died. What member 1 holds is the truth.
    let (mut world, workers) = World::running(3);
    let (leases, _) = world.lease(workers[0], 1);
    let (first, second) = (names(0, leases[0].shard, 0..1), names(0, leases[0].shard, 1..2));
    world.report(workers[0], 1, Some(&first));
    world.report(workers[0], 2, Some(&second));
    world.report(workers[1], 1, None);
    world.die(workers[0]);
    let (step1, step2) = (world.record(1, &first), world.record(2, &second));
    world.stopped(workers[1], 2, StopCause::Aborted, vec![step1, step2]);
    world.stopped(workers[2], 1, StopCause::Aborted, vec![]);
    assert_eq!((world.core.final_step(), world.core.ledger().totals().committed), (Step(2), 2));
    let newcomer = world.join(None).unwrap();
    world.ready(newcomer);
    world.bootstrap(newcomer);
    let assignment = world.assignment(workers[2]);
    assert_eq!((assignment.base_step, assignment.source_index, assignment.broadcast_state), (Step(2), MemberIndex(1), true));
    // The next holder of the dead member's shard passes over both samples.
    let (again, _) = world.lease(newcomer, 1);
    assert_eq!(again[0].done.iter().collect::<Vec<_>>(), [0, 1]);
}

#[test]
fn step_that_only_the_dead_applied_is_void() {
    let (mut world, workers) = World::running(2);
    let (leases, _) = world.lease(workers[0], 1);
    let shard = leases[0].shard;
    world.report(workers[0], 1, Some(&names(0, shard, 0..1)));
    world.report(workers[1], 1, None);
    world.report(workers[0], 2, Some(&names(0, shard, 1..2)));
    world.die(workers[0]);
    world.stopped(workers[1], 1, StopCause::Aborted, vec![]);
    assert_eq!((world.core.final_step(), world.core.ledger().totals().committed), (Step(1), 1));
    assert!(world.said.contains(&Effect::Void { generation: Generation(1), after: Step(1) }));
}

#[test]
fn work_of_an_older_generation_is_void() {
    let (mut world, workers) = World::running(2);
    world.die(workers[1]);
    world.stopped(workers[0], 0, StopCause::Aborted, vec![]);
    let newcomer = world.join(None).unwrap();
    world.ready(newcomer);
    let stale = StepReport { generation: Generation(1), step: Step(1), record: None, timings: StepTimings::default(), snapshot: None };
    let error = world.say(workers[0], FromWorker::StepReport(stale)).unwrap_err();
    assert!(matches!(error, CoreError::StaleGeneration { .. }));
    assert!(matches!(
        world.say(workers[0], FromWorker::LeaseRequest { generation: Generation(1), num_leases: 1, is_idle: false }),
        Err(CoreError::StaleGeneration { .. })
    ));
}

#[test]
fn ranks_with_different_weights_end_the_job() {
    let (mut world, workers) = World::running(2);
    world.report_with(workers[0], 1, Some(&[]), Some(5)).unwrap();
    world.report_with(workers[1], 1, None, Some(6)).unwrap();
    let Some(Outcome::Failed { reason }) = world.outcome() else { panic!() };
    assert_eq!(reason, "rank 1 holds other weights than rank 0 after step 1: the ranks have diverged");
}

#[test]
fn sample_trained_twice_ends_the_job() {
    let (mut world, workers) = World::running(1);
    let twice = names(0, ShardId(0), 0..1);
    world.report(workers[0], 1, Some(&twice));
    world.report(workers[0], 2, Some(&twice));
    let Some(Outcome::Failed { reason }) = world.outcome() else { panic!() };
    assert!(reason.contains("0/0/0 was trained twice") && reason.ends_with("(shard 0: 0.tar)"), "{reason}");
}

#[test]
fn skipped_steps_count_their_samples_and_a_row_of_them_ends_the_job() {
    let (mut world, workers) = World::running(1);
    for step in 1..=3 {
        let index = step as u32;
        let mut record = world.record(step, &names(0, ShardId(0), index..index + 1));
        record.skipped = true;
        let report = StepReport {
            generation: Generation(1),
            step: Step(step),
            record: Some(record),
            timings: StepTimings::default(),
            snapshot: None,
        };
        world.say(workers[0], FromWorker::StepReport(report)).unwrap();
        assert_eq!(world.outcome().is_some(), step == 3);
    }
    assert_eq!(world.core.ledger().totals().not_finite, 3);
}

#[test]
fn durable_steps_are_told_with_the_next_heartbeat() {
    let (mut world, workers) = World::running(1);
    world.report(workers[0], 1, Some(&[]));
    world.pass(1, &workers);
    assert_eq!(world.sent(workers[0]).pop(), Some(ToWorker::Durable { generation: Generation(1), step: Step(1) }));
}

fn said(step: u64, collective: f32, record: Option<StepRecord>) -> StepReport {
    let timings = StepTimings { collective, ..StepTimings::default() };
    StepReport { generation: Generation(1), step: Step(step), record, timings, snapshot: None }
}

#[test]
fn collective_of_a_step_takes_what_the_shortest_stay_in_it_takes_whoever_reports_first() {
    let world = World::new(config(2));
    for stays in [[5.0, 3.0], [3.0, 5.0]] {
        let mut progress = Progress::start(Step(0), 2);
        progress.report(MemberIndex(0), said(1, stays[0], Some(world.record(1, &[]))));
        progress.report(MemberIndex(1), said(1, stays[1], None));
        assert_eq!(progress.next_final().unwrap().timings.collective, 3.0, "{stays:?}");
    }
}

#[test]
fn steps_done_while_nobody_listened_are_final_once_all_have_told_of_them() {
    let world = World::new(config(2));
    let records = |steps: std::ops::RangeInclusive<u64>| steps.map(|step| world.record(step, &[])).collect::<Vec<_>>();
    let mut progress = Progress::start(Step(0), 2);
    // One that says more of what was in a step than it says that it holds is not believed in that.
    progress.catch_up(MemberIndex(0), Step(2), records(1..=3));
    assert!(progress.next_final().is_some(), "it reported the next one too");
    assert!(progress.next_final().is_none(), "the other may not have step 2");
    progress.catch_up(MemberIndex(1), Step(2), vec![]);
    assert_eq!(progress.next_final().unwrap().record.step, Step(2));
    progress.report(MemberIndex(0), said(3, 0.0, None));
    progress.report(MemberIndex(1), said(3, 0.0, None));
    assert!(progress.next_final().is_none(), "nobody who holds step 3 has told its samples");
}
