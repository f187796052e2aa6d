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

/// Readers are far ahead of training, and only what is broken is told as it is read.
#[test]
fn broken_samples_are_a_share_of_what_was_read_not_of_what_was_trained() {
    let (mut world, workers) = World::running(1);
    let (leases, _) = world.lease(workers[0], 1);
    let bad = |index| SkippedSample { index, reason: SkipReason::Bad, key: String::new(), detail: "no_jpg: none".into() };
    let mut report = |skipped, num_samples| {
        let report = ShardReport { lease: leases[0].id, skipped, num_samples, truncated: String::new() };
        world.say(workers[0], FromWorker::ShardReport(report)).unwrap();
        world.outcome()
    };
    // Two of each hundred, and none trained yet.
    assert_eq!(report((0..10).map(|at| bad(50 * at + 49)).collect(), None), None);
    let Some(Outcome::Failed { reason }) = report((500..520).map(bad).collect(), Some(520)) else { panic!() };
    assert!(reason.starts_with("30 of 520 samples are broken, most often no_jpg (30)"), "{reason}");
}

#[test]
fn samples_that_the_method_leaves_out_are_not_shown_as_broken_and_none_is_shown_twice() {
    let (mut world, workers) = World::running(1);
    let (leases, _) = world.lease(workers[0], 1);
    let sample = |index, reason| SkippedSample { index, reason, key: format!("k{index}"), detail: "too_small: 8 x 8".into() };
    let filtered = (0..200).map(|index| sample(index, SkipReason::Filtered));
    let skipped: Vec<SkippedSample> = filtered.chain([sample(200, SkipReason::Bad), sample(201, SkipReason::Bad)]).collect();
    let report = ShardReport { lease: leases[0].id, skipped, num_samples: None, truncated: String::new() };
    for _ in 0..2 {
        // As a worker says again after its stream broke.
        world.say(workers[0], FromWorker::ShardReport(report.clone())).unwrap();
    }
    let shown = |effect: &Effect| match effect {
        Effect::Notice(Notice::BadData { key, .. }) => Some(key.clone()),
        _ => None,
    };
    assert_eq!(world.said.iter().filter_map(shown).collect::<Vec<_>>(), ["k200", "k201"]);
    let totals = world.core.ledger().totals();
    assert_eq!((totals.filtered, totals.bad, world.outcome()), (200, 2, None));
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
    let asks = FromWorker::LeaseRequest { generation: Generation(1), num_leases: 1, is_idle: false };
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

/// Two members of a job of one shard and one epoch: the first has the lease, the second nothing.
fn one_shard() -> (World, WorkerId, WorkerId, Lease) {
    let mut one = config(2);
    (one.shards, one.sources) = (Arc::new(["0.tar".into()]), Arc::new([Source::unnamed(1)]));
    (one.epochs, one.last_step) = (Some(1), None);
    let mut world = World::new(one);
    let (a, b) = (world.join(None).unwrap(), world.join(None).unwrap());
    world.ready(a);
    world.ready(b);
    world.bootstrap(a);
    let lease = world.lease(a, 1).0.remove(0);
    (world, a, b, lease)
}

fn ask(world: &mut World, worker: WorkerId, is_idle: bool) {
    let generation = world.core.generation();
    world.say(worker, FromWorker::LeaseRequest { generation, num_leases: 1, is_idle }).unwrap();
}

fn last_grant(world: &World, worker: WorkerId) -> (Vec<Lease>, bool, bool) {
    let grant = |message: ToWorker| match message {
        ToWorker::LeaseGrant { leases, none_left, ask_when_idle, .. } => Some((leases, none_left, ask_when_idle)),
        _ => None,
    };
    world.sent(worker).into_iter().rev().find_map(grant).unwrap()
}

#[test]
fn idle_member_gets_the_rest_of_a_shard_that_another_has_begun() {
    let (mut world, a, b, lease) = one_shard();
    assert_eq!(lease.end, None);
    ask(&mut world, b, false);
    assert_eq!(last_grant(&world, b), (vec![], true, true), "nothing is left, but another reads");
    ask(&mut world, b, true);
    assert!(world.sent(a).contains(&ToWorker::GiveBack { leases: vec![lease.id], for_idle: true }));
    world.say(a, FromWorker::GaveBack { lease: lease.id, from: 3 }).unwrap();
    let (leases, none_left, _) = last_grant(&world, b);
    assert_eq!((leases.len(), none_left, leases[0].shard, leases[0].end), (1, false, lease.shard, None));
    assert_eq!(leases[0].done.iter().collect::<Vec<_>>(), [0, 1, 2], "these are still the first reader's");
    let written = world.said.iter().position(|effect| *effect == Effect::Persist(Fact::GaveBack { lease: lease.id, from: 3 }));
    let granted = world.said.iter().rposition(|effect| matches!(effect, Effect::Persist(Fact::Leases { .. })));
    assert!(written.is_some() && written < granted);
    ask(&mut world, a, false);
    assert_eq!(last_grant(&world, a), (vec![], true, true), "should it be idle before the other, it can have some of it back");
    // Both have their part trained, and the shard is done.
    world.report(a, 1, Some(&names(0, lease.shard, 0..5)));
    world.report(b, 1, None);
    let report = ShardReport { lease: leases[0].id, skipped: vec![], num_samples: Some(5), truncated: String::new() };
    world.say(b, FromWorker::ShardReport(report)).unwrap();
    assert_eq!(world.core.shards(0, Some(Epoch(0)), 0, 9).unwrap().shards[0].state, ShardState::Done);
}

#[test]
fn idle_member_whose_question_is_overtaken_by_the_end_of_the_shard_hears_that_nothing_is_left() {
    let (mut world, a, b, lease) = one_shard();
    ask(&mut world, b, true);
    let report = ShardReport { lease: lease.id, skipped: vec![], num_samples: Some(5), truncated: String::new() };
    world.say(a, FromWorker::ShardReport(report)).unwrap();
    assert_eq!(last_grant(&world, b), (vec![], true, false));
}

#[test]
fn part_of_a_dead_reader_goes_to_the_next_and_ends_where_the_other_part_begins() {
    let (mut world, a, b, lease) = one_shard();
    ask(&mut world, b, true);
    world.say(a, FromWorker::GaveBack { lease: lease.id, from: 3 }).unwrap();
    let rest = last_grant(&world, b).0.remove(0);
    world.die(a);
    world.stopped(b, 0, StopCause::Aborted, vec![]);
    let newcomer = world.join(None).unwrap();
    world.ready(newcomer);
    world.bootstrap(newcomer);
    assert_eq!(world.assignment(b).held_leases, [rest.id]);
    let (leases, _) = world.lease(newcomer, 1);
    assert_eq!((leases[0].shard, leases[0].end, leases[0].done.count()), (lease.shard, Some(3), 0));
    let page = world.core.shards(0, None, 0, 9).unwrap();
    let holder = |worker, rank| LeaseHolder { worker, rank: Some(Rank(rank)) };
    assert_eq!(page.shards[0].state, ShardState::Leased(vec![holder(b, 1), holder(newcomer, 0)]));
}

#[test]
fn leaving_member_gives_back_what_it_has_not_begun_and_gets_nothing_more() {
    let (mut world, workers) = World::running(2);
    let (leases, _) = world.lease(workers[1], 2);
    world.event(Event::Drain { rank: Rank(1) }).unwrap();
    let ids: Vec<LeaseId> = leases.iter().map(|lease| lease.id).collect();
    assert!(world.sent(workers[1]).contains(&ToWorker::GiveBack { leases: ids.clone(), for_idle: false }));
    world.say(workers[1], FromWorker::GaveBack { lease: ids[1], from: 0 }).unwrap();
    let (others, _) = world.lease(workers[0], 1);
    assert_eq!((others[0].epoch, others[0].shard), (leases[1].epoch, leases[1].shard), "before it is gone");
    ask(&mut world, workers[1], false);
    assert_eq!(last_grant(&world, workers[1]), (vec![], true, false));
}

#[test]
fn shards_are_shown_a_page_at_a_time_with_what_became_of_them() {
    let (mut world, workers) = World::running(1);
    let (leases, _) = world.lease(workers[0], 1);
    let skip = |index, reason, rule: &str| SkippedSample { index, reason, key: String::new(), detail: format!("{rule}: why") };
    let skipped = vec![skip(3, SkipReason::Bad, "no_jpg"), skip(4, SkipReason::Filtered, "too_small")];
    let report = ShardReport { lease: leases[0].id, skipped, num_samples: Some(5), truncated: String::new() };
    world.say(workers[0], FromWorker::ShardReport(report)).unwrap();
    world.report(workers[0], 1, Some(&names(0, leases[0].shard, 0..2)));
    let page = |skip, limit| world.core.shards(0, None, skip, limit).unwrap();
    assert_eq!((page(0, 3).shards.len(), page(0, 3).next, page(3, 3).shards.len(), page(3, 3).next), (3, Some(3), 1, None));
    assert!(page(9, 3).shards.is_empty() && world.core.shards(1, None, 0, 1).is_none());
    let all = page(0, 9).shards;
    let mine = &all[leases[0].shard.0 as usize];
    let counts = mine.counts.counts;
    assert_eq!((counts.committed, counts.filtered, counts.bad, mine.counts.num_samples), (2, 1, 1, Some(5)));
    assert!(matches!(&mine.state, ShardState::Leased(holders) if holders[0].rank == Some(Rank(0))));
    assert_eq!(all.iter().filter(|shard| shard.state == ShardState::Pending).count(), 3);
    let source = &world.core.sources()[0];
    assert_eq!((source.num_shards, source.num_leased, source.num_done, source.totals.committed), (4, 1, 0, 2));
    assert_eq!((source.rules.bad["no_jpg"], source.rules.filtered["too_small"]), (1, 1));
}

#[test]
fn what_is_dealt_to_a_leaving_member_that_never_asked_holds_nobody_up() {
    let mut two = config(2);
    (two.shards, two.sources) = (Arc::new(["0.tar".into(), "1.tar".into()]), Arc::new([Source::unnamed(2)]));
    (two.epochs, two.last_step) = (Some(1), None);
    let mut world = World::new(two);
    let (a, b) = (world.join(None).unwrap(), world.join(None).unwrap());
    world.ready(a);
    world.ready(b);
    world.bootstrap(a);
    let (own, _) = world.lease(a, 1);
    let report = ShardReport { lease: own[0].id, skipped: vec![], num_samples: Some(0), truncated: String::new() };
    world.say(a, FromWorker::ShardReport(report)).unwrap();
    ask(&mut world, a, false);
    assert_eq!(last_grant(&world, a).0, own, "the other may want its first");
    world.event(Event::Drain { rank: Rank(1) }).unwrap();
    assert_eq!(last_grant(&world, a).0.len(), 1);
    assert_ne!(last_grant(&world, a).0, own);
}

#[test]
fn one_that_has_left_is_given_nothing_though_it_had_asked() {
    let (mut world, a, b, lease) = one_shard();
    // It waits for the rest of what the other reads, and is drained after the generation has broken up.
    ask(&mut world, b, true);
    world.stopped(a, 0, StopCause::Aborted, vec![]);
    world.stopped(b, 0, StopCause::Aborted, vec![]);
    world.event(Event::Drain { rank: Rank(1) }).unwrap();
    world.say(a, FromWorker::GaveBack { lease: lease.id, from: 3 }).unwrap();
    assert_eq!(world.core.leases.holders(), BTreeSet::from([a]));
}

#[test]
fn epoch_without_a_sample_to_train_ends_the_job_and_says_what_kept_them_out() {
    for num_trained in [0, 1] {
        let (mut world, workers) = World::running(1);
        let (leases, _) = world.lease(workers[0], 4);
        let trained = names(0, leases[0].shard, 0..num_trained);
        world.report(workers[0], 1, Some(&trained));
        for (index, lease) in leases.iter().enumerate() {
            assert_eq!(world.outcome(), None);
            let skip = |index| SkippedSample {
                index,
                reason: if index == 2 { SkipReason::Bad } else { SkipReason::Filtered },
                key: String::new(),
                detail: if index == 2 { "no_jpg: no member .jpg".into() } else { "too_small: 8 x 8".into() },
            };
            let first = if index == 0 { num_trained } else { 0 };
            let skipped = (first..if index == 0 { 3 } else { 2 }).map(skip).collect();
            let num_samples = Some(if index == 0 { 3 } else { 2 });
            let report = ShardReport { lease: lease.id, skipped, num_samples, truncated: String::new() };
            world.say(workers[0], FromWorker::ShardReport(report)).unwrap();
        }
        let reason = match world.outcome() {
            Some(Outcome::Failed { reason }) => reason,
            other => String::from(if other.is_none() { "" } else { panic!("{other:?}") }),
        };
        let expected = "epoch 0 is over and none of its samples could be trained: of the 4 shards' samples 8 were filtered and 1 broken so far, \
                        most often too_small 8, no_jpg 1, 0 trained; see the filters in [data]";
        assert_eq!(reason, if num_trained == 0 { expected } else { "" });
    }
}

/// Reports of samples that one rule leaves out, an index each.
fn left_out(lease: &Lease, rule: &str, indices: std::ops::Range<u32>, num_samples: Option<u32>) -> FromWorker {
    let skip = |index| SkippedSample { index, reason: SkipReason::Filtered, key: String::new(), detail: format!("{rule}: why") };
    FromWorker::ShardReport(ShardReport { lease: lease.id, skipped: indices.map(skip).collect(), num_samples, truncated: String::new() })
}

#[test]
fn filters_that_leave_out_most_samples_are_told_once() {
    let (mut world, workers) = World::running(1);
    let (leases, _) = world.lease(workers[0], 3);
    let told = |world: &World| {
        let notice = |effect: &Effect| match effect {
            Effect::Notice(Notice::MostlyFiltered { num_filtered, num_read, rules }) => Some((*num_filtered, *num_read, rules.clone())),
            _ => None,
        };
        world.said.iter().filter_map(notice).collect::<Vec<_>>()
    };
    // A few, and half of more, are no reason for alarm.
    world.say(workers[0], left_out(&leases[0], "too_small", 0..50, None)).unwrap();
    world.say(workers[0], left_out(&leases[0], "too_small", 50..60, Some(120))).unwrap();
    assert!(told(&world).is_empty());
    world.say(workers[0], left_out(&leases[1], "watermark", 0..60, Some(60))).unwrap();
    world.say(workers[0], left_out(&leases[2], "watermark", 0..60, Some(60))).unwrap();
    let rules = [("too_small".to_owned(), 60), ("watermark".to_owned(), 60)].into();
    assert_eq!(told(&world), [(120, 180, rules)]);
    assert_eq!(world.outcome(), None);
}

#[test]
fn captions_of_which_none_is_a_pair_are_told_once() {
    for num_native in [150, 149] {
        let (mut world, workers) = World::running(1);
        let (leases, _) = world.lease(workers[0], 1);
        let mut record = world.record(1, &names(0, leases[0].shard, 0..150));
        record.native = num_native;
        let (generation, step) = (world.core.generation(), Step(1));
        let report = StepReport { generation, step, record: Some(record), timings: StepTimings::default(), snapshot: None };
        world.say(workers[0], FromWorker::StepReport(report)).unwrap();
        for from in [150, 200, 250] {
            world.say(workers[0], left_out(&leases[0], "one_sided", from..from + 50, None)).unwrap();
        }
        let told = world.said.iter().filter_map(|effect| match effect {
            Effect::Notice(Notice::NoPairs { num_one_sided, num_native }) => Some((*num_one_sided, *num_native)),
            _ => None,
        });
        // One of them was trained by its pair: the keys are right.
        assert_eq!(told.collect::<Vec<_>>(), vec![(100, 150); usize::from(num_native == 150)]);
    }
}
