use super::*;

fn name(epoch: u32, shard: u32, index: u32) -> SampleName {
    SampleName { epoch: Epoch(epoch), shard: ShardId(shard), index }
}

#[test]
fn rules_are_counted_by_name_and_odd_names_together() {
    let mut next = 0..;
    let mut skip = |reason, rule: &str, ledger: &mut Ledger| {
        let index = next.next().unwrap();
        let name = SampleName { epoch: Epoch(0), shard: ShardId(0), index };
        let sample = SkippedSample { index, reason, key: String::new(), detail: format!("{rule}: words") };
        assert!(ledger.skip_data(name, &sample).unwrap());
        assert!(!ledger.skip_data(name, &sample).unwrap(), "a second reader's word is no news");
    };
    let mut ledger = Ledger::new(1);
    for rule in ["no_jpg", "bad_json", "bad_json", "Bad JSON", "", &"x".repeat(33)] {
        skip(SkipReason::Bad, rule, &mut ledger);
    }
    skip(SkipReason::Filtered, "too_small", &mut ledger);
    assert_eq!(ledger.rules().filtered, BTreeMap::from([("too_small".into(), 1)]));
    assert_eq!(ledger.rules().most_often_bad(), Some(("other", 3)));
    assert_eq!(ledger.rules().bad["bad_json"], 2);
    for number in 0..200_u8 {
        let name: String = [number / 26, number % 26].map(|digit| char::from(b'a' + digit)).iter().collect();
        skip(SkipReason::Bad, &name, &mut ledger);
    }
    assert!(ledger.rules().bad.len() <= Rules::MAX_NAMES + 1);
    assert_eq!(ledger.rules().bad.values().sum::<u64>(), 206);
}

#[test]
fn shard_is_done_when_every_sample_is_trained_or_skipped() {
    let mut ledger = Ledger::new(2);
    assert_eq!(ledger.commit(name(0, 0, 0), Step(1)), Ok(false));
    assert_eq!(ledger.skip(name(0, 0, 2), Skip::Data(SkipReason::Bad)), Ok(true));
    assert_eq!(ledger.set_size(Epoch(0), ShardId(0), 3), Ok(false));
    assert!(!ledger.is_done(Epoch(0), ShardId(0)));
    assert_eq!(ledger.commit(name(0, 0, 1), Step(2)), Ok(true));
    assert!(ledger.is_done(Epoch(0), ShardId(0)) && !ledger.is_done(Epoch(1), ShardId(0)));
    assert_eq!(ledger.totals(), Totals { committed: 2, bad: 1, ..Totals::default() });
}

#[test]
fn epoch_closes_with_its_last_shard_and_an_empty_shard_counts() {
    let mut ledger = Ledger::new(2);
    assert_eq!(ledger.set_size(Epoch(0), ShardId(1), 0), Ok(true));
    ledger.set_size(Epoch(0), ShardId(0), 1).unwrap();
    assert_eq!(ledger.first_open_epoch(), Epoch(0));
    ledger.commit(name(0, 0, 0), Step(1)).unwrap();
    assert_eq!((ledger.first_open_epoch(), ledger.num_done(Epoch(0))), (Epoch(1), 2));
}

#[test]
fn refusals_name_what_happened() {
    let mut ledger = Ledger::new(1);
    ledger.commit(name(0, 0, 0), Step(1)).unwrap();
    assert!(matches!(ledger.commit(name(0, 0, 0), Step(2)), Err(LedgerError::TrainedTwice { .. })));
    ledger.skip(name(0, 0, 1), Skip::NotFinite).unwrap();
    assert!(matches!(ledger.commit(name(0, 0, 1), Step(2)), Err(LedgerError::TrainedSkipped(_))));
    assert!(matches!(ledger.commit(name(0, 7, 1), Step(2)), Err(LedgerError::NoSuchShard { .. })));
    ledger.set_size(Epoch(0), ShardId(0), 5).unwrap();
    assert!(matches!(ledger.set_size(Epoch(1), ShardId(0), 6), Err(LedgerError::SizeChanged { .. })));
    // A sample of a shard that is done was trained before.
    let mut done = Ledger::new(1);
    done.set_size(Epoch(0), ShardId(0), 1).unwrap();
    done.commit(name(0, 0, 0), Step(1)).unwrap();
    assert!(matches!(done.commit(name(0, 0, 0), Step(2)), Err(LedgerError::TrainedTwice { .. })));
}

#[test]
fn next_reader_passes_over_what_is_done() {
    let mut ledger = Ledger::new(1);
    ledger.commit(name(3, 0, 4), Step(1)).unwrap();
    ledger.skip(name(3, 0, 1), Skip::Data(SkipReason::Filtered)).unwrap();
    assert_eq!(ledger.done_samples(Epoch(3), ShardId(0)).iter().collect::<Vec<_>>(), [1, 4]);
}

#[test]
fn sources_have_their_own_epochs_and_counts() {
    let mut ledger = Ledger::of_sources([1, 2]);
    for shard in [0, 1] {
        ledger.set_size(Epoch(0), ShardId(shard), 2).unwrap();
        ledger.commit(name(0, shard, 0), Step(1)).unwrap();
        ledger.skip(name(0, shard, 1), Skip::Data(SkipReason::Filtered)).unwrap();
    }
    assert_eq!((ledger.open_epoch_of(0), ledger.open_epoch_of(1), ledger.first_open_epoch()), (Epoch(1), Epoch(0), Epoch(0)));
    assert_eq!((ledger.shards_of(1), ledger.num_done_of(1, Epoch(0))), (1..3, 1));
    assert_eq!(ledger.totals_of(1), Totals { committed: 1, filtered: 1, ..Totals::default() });
    assert_eq!(ledger.totals().seen(), 4);
}

#[test]
fn counts_of_a_shard_outlive_its_bitmaps() {
    let mut ledger = Ledger::new(2);
    ledger.commit(name(0, 1, 0), Step(1)).unwrap();
    ledger.skip(name(0, 1, 1), Skip::Data(SkipReason::Bad)).unwrap();
    ledger.skip(name(0, 1, 1), Skip::NotFinite).unwrap();
    let open = ledger.shard_counts(Epoch(0), ShardId(1));
    let counts = Totals { committed: 1, bad: 1, ..Totals::default() };
    assert_eq!(open, ShardCounts { done: false, num_samples: None, counts });
    ledger.set_size(Epoch(0), ShardId(1), 2).unwrap();
    assert_eq!(ledger.shard_counts(Epoch(0), ShardId(1)), ShardCounts { done: true, num_samples: Some(2), counts });
    assert_eq!(ledger.shard_counts(Epoch(0), ShardId(0)), ShardCounts::default());
}

#[test]
fn ledger_survives_its_checkpoint() {
    let mut ledger = Ledger::of_sources([1, 2]);
    ledger.commit(name(0, 2, 9), Step(1)).unwrap();
    ledger.set_size(Epoch(0), ShardId(1), 0).unwrap();
    let text = serde_json::to_string(&ledger).unwrap();
    assert_eq!(serde_json::from_str::<Ledger>(&text).unwrap(), ledger);
}

#[test]
fn shard_that_is_not_there_in_one_epoch_may_be_there_in_the_next() {
    let report = |num: u32, truncated: &str| ShardReport {
        lease: peapod_proto::ids::LeaseId(1),
        skipped: vec![],
        num_samples: Some(num),
        truncated: truncated.into(),
    };
    let mut ledger = Ledger::new(1);
    let take = |ledger: &mut Ledger, epoch, report: &ShardReport| ledger.take_report(Epoch(epoch), ShardId(0), report, |_| {});
    take(&mut ledger, 0, &report(0, "no such file")).unwrap();
    assert_eq!(ledger.first_open_epoch(), Epoch(1));
    take(&mut ledger, 1, &report(2, "")).unwrap();
    ledger.commit(name(1, 0, 0), Step(1)).unwrap();
    ledger.commit(name(1, 0, 1), Step(1)).unwrap();
    assert_eq!(ledger.first_open_epoch(), Epoch(2));
    // One that was there may not be passed over.
    let gone = take(&mut ledger, 2, &report(0, "no such file")).unwrap_err();
    assert_eq!(gone, LedgerError::SizeChanged { shard: ShardId(0), before: 2, now: 0 });
}

#[test]
fn reader_cannot_end_a_shard_before_samples_that_another_has_found_in_it() {
    let mut ledger = Ledger::new(2);
    for index in 0..3 {
        ledger.commit(name(0, 0, index), Step(1)).unwrap();
        ledger.commit(name(0, 1, index), Step(1)).unwrap();
    }
    let error = ledger.set_size(Epoch(0), ShardId(0), 2).unwrap_err();
    assert_eq!(error, LedgerError::SizeChanged { shard: ShardId(0), before: 3, now: 2 });
    let report =
        ShardReport { lease: peapod_proto::ids::LeaseId(1), skipped: vec![], num_samples: Some(0), truncated: "no such file".into() };
    let error = ledger.take_report(Epoch(0), ShardId(1), &report, |_| {}).unwrap_err();
    assert_eq!(error, LedgerError::SizeChanged { shard: ShardId(1), before: 3, now: 0 });
}
