//! Who reads what, and what reading shows.

use super::*;

#[test]
fn too_much_bad_data_ends_the_job_and_the_first_are_shown() {
    let (mut world, workers) = World::running(1);
    let (leases, _) = world.lease(workers[0], 1);
    let bad = |index| SkippedSample { index, reason: SkipReason::Bad, key: format!("k{index}"), detail: "no_jpg: no member .jpg".into() };
    let report =
        |skipped| FromWorker::ShardReport(ShardReport { lease: leases[0].id, skipped, num_samples: None, truncated: String::new() });
    world.say(workers[0], report((0..5).map(bad).collect())).unwrap();
    assert_eq!(world.outcome(), None);
    world.say(workers[0], report((5..30).map(bad).collect())).unwrap();
    let Some(Outcome::Failed { reason }) = world.outcome() else { panic!() };
    assert!(reason.contains("broken, most often no_jpg (30), more than data.max_bad_fraction"), "{reason}");
    let shown = world.said.iter().filter(|effect| matches!(effect, Effect::Notice(Notice::BadData { .. }))).count();
    assert_eq!(shown, 10);
}

#[test]
fn truncated_shard_is_shown_and_one_that_cannot_be_read_counts_as_a_share_of_all() {
    let (mut world, workers) = World::running(1);
    let (leases, _) = world.lease(workers[0], 2);
    let report = |lease: &Lease, num, why: &str| {
        FromWorker::ShardReport(ShardReport { lease: lease.id, skipped: vec![], num_samples: Some(num), truncated: why.into() })
    };
    world.say(workers[0], report(&leases[0], 7, "unexpected end")).unwrap();
    assert!(world.said.iter().any(|effect| matches!(effect, Effect::Notice(Notice::BadData { key, .. }) if key.is_empty())));
    assert_eq!(world.outcome(), None);
    world.say(workers[0], report(&leases[1], 0, "open 3.tar: no such file")).unwrap();
    let Some(Outcome::Failed { reason }) = world.outcome() else { panic!() };
    assert!(reason.starts_with("1 of 4 shards cannot be read at all") && reason.contains("no such file"), "{reason}");
}

#[test]
fn grant_says_when_no_lease_is_left() {
    let mut with_epochs = config(1);
    with_epochs.epochs = Some(1);
    let mut world = World::new(with_epochs);
    let worker = world.join(None).unwrap();
    world.ready(worker);
    world.bootstrap(worker);
    let (leases, none_left) = world.lease(worker, 3);
    assert_eq!((leases.len(), none_left), (3, false));
    let (leases, none_left) = world.lease(worker, 3);
    assert_eq!((leases.len(), none_left), (1, true));
}

#[test]
fn request_that_cannot_be_answered_yet_is_answered_when_it_can() {
    let mut with_epochs = config(2);
    with_epochs.epochs = Some(1);
    let mut world = World::new(with_epochs);
    let (a, b) = (world.join(None).unwrap(), world.join(None).unwrap());
    world.ready(a);
    world.ready(b);
    world.bootstrap(a);
    let (own, _) = world.lease(a, 2);
    let asks = FromWorker::LeaseRequest { generation: Generation(1), num_leases: 1 };
    let grants = |world: &World| world.sent(a).iter().filter(|message| matches!(message, ToWorker::LeaseGrant { .. })).count();
    world.say(a, asks).unwrap();
    assert_eq!(grants(&world), 1, "what is left is dealt to the other");
    world.lease(b, 1);
    for lease in &own {
        let report = ShardReport { lease: lease.id, skipped: vec![], num_samples: Some(3), truncated: String::new() };
        world.say(a, FromWorker::ShardReport(report)).unwrap();
    }
    assert_eq!(grants(&world), 2, "it has read its own: it helps out");
}
