use super::*;
use peapod_proto::ids::{SampleName, Step};

fn take(leases: &mut Leases, member: u32, num: u32, ledger: &Ledger) -> Vec<Granted> {
    match leases.grant(WorkerId(member.into()), MemberIndex(member), num, false, ledger) {
        Grant::Now { leases, .. } => leases,
        _ => Vec::new(),
    }
}

fn drain(leases: &mut Leases, members: u32, ledger: &Ledger) -> Vec<Vec<(u32, u32)>> {
    let mut taken = vec![Vec::new(); members as usize];
    loop {
        let mut any = false;
        for member in 0..members {
            for lease in take(leases, member, 1, ledger) {
                leases.set_read(lease.id);
                taken[member as usize].push((lease.epoch.0, lease.shard.0));
                any = true;
            }
        }
        if !any {
            return taken;
        }
    }
}

#[test]
fn every_shard_of_every_epoch_is_granted_once() {
    for members in 1..5 {
        let ledger = Ledger::new(7);
        let mut leases = Leases::new(1, &[Source::unnamed(7)], Some(3), &ledger);
        leases.deal_among(members);
        let mut all: Vec<_> = drain(&mut leases, members, &ledger).concat();
        all.sort_unstable();
        let expected: Vec<_> = (0..3).flat_map(|epoch| (0..7).map(move |shard| (epoch, shard))).collect();
        assert_eq!(all, expected, "{members} members");
    }
}

#[test]
fn deal_does_not_depend_on_who_asks_first() {
    let ledger = Ledger::new(6);
    let ask = |order: [u32; 4]| {
        let mut leases = Leases::new(3, &[Source::unnamed(6)], None, &ledger);
        leases.deal_among(2);
        let mut got: Vec<_> = order.iter().map(|&m| (m, take(&mut leases, m, 1, &ledger)[0].shard)).collect();
        got.sort();
        got
    };
    assert_eq!(ask([0, 0, 1, 1]), ask([1, 1, 0, 0]));
    assert_eq!(ask([0, 1, 0, 1]), ask([1, 0, 0, 1]));
}

#[test]
fn parts_that_touch_are_one_again_and_parts_that_do_not_stay_apart() {
    let returned = |parts: &[(u32, u32)]| {
        let mut leases = Leases::new(1, &[Source::unnamed(1)], Some(1), &Ledger::new(1));
        parts.iter().for_each(|&(from, to)| leases.give_up(0, Part { from, to }, 0));
        leases.returned.iter().map(|(&(_, from), &(to, _))| (from, to)).collect::<Vec<_>>()
    };
    for parts in [[(0, 5), (5, 9), (12, 20), (9, 12)], [(9, 12), (12, 20), (5, 9), (0, 5)], [(0, 5), (12, 20), (9, 12), (5, 9)]] {
        assert_eq!(returned(&parts), [(0, 20)], "{parts:?}");
    }
    for parts in [[(0, 5), (6, 9)], [(6, 9), (0, 5)]] {
        assert_eq!(returned(&parts), [(0, 5), (6, 9)], "{parts:?}");
    }
}

#[test]
fn idle_member_takes_over_what_others_have_left_but_never_their_first() {
    let ledger = Ledger::new(4);
    let mut leases = Leases::new(1, &[Source::unnamed(4)], Some(1), &ledger);
    leases.deal_among(2);
    let own = take(&mut leases, 0, 3, &ledger);
    assert_eq!(own.len(), 2, "its own deal, nothing of the other's");
    assert_eq!(leases.grant(WorkerId(0), MemberIndex(0), 1, false, &ledger), Grant::Later, "it still reads");
    own.iter().for_each(|lease| leases.set_read(lease.id));
    assert_eq!(leases.grant(WorkerId(0), MemberIndex(0), 1, false, &ledger), Grant::Later, "the other has not had its first");
    assert_eq!(take(&mut leases, 1, 1, &ledger).len(), 1);
    let over = leases.grant(WorkerId(0), MemberIndex(0), 2, false, &ledger);
    assert!(matches!(over, Grant::Now { leases, none_left: true, .. } if leases.len() == 1));
    let rest = leases.grant(WorkerId(1), MemberIndex(1), 1, false, &ledger);
    assert_eq!(rest, Grant::Now { leases: vec![], none_left: true, when_idle: true }, "the other still reads what it took over");
}

/// What a member gets that has nothing left to train.
fn when_idle(leases: &mut Leases, member: u32, ledger: &Ledger) -> Grant {
    leases.grant(WorkerId(member.into()), MemberIndex(member), 1, true, ledger)
}

#[test]
fn rest_of_the_last_shard_goes_round_among_the_idle_but_not_for_ever() {
    let ledger = Ledger::new(1);
    let mut leases = Leases::new(1, &[Source::unnamed(1)], Some(1), &ledger);
    leases.deal_among(2);
    let mut lease = take(&mut leases, 0, 1, &ledger)[0];
    assert_eq!(lease.part, Part::WHOLE);
    let mut reader = 0;
    for pass in 1..=u32::from(MAX_PASSES) {
        let idle = 1 - reader;
        assert_eq!(when_idle(&mut leases, idle, &ledger), Grant::AskBack { holder: WorkerId(reader.into()), lease: lease.id });
        leases.give_back(lease.id, 5 * pass);
        assert_eq!(leases.unread_by(WorkerId(reader.into())), []);
        lease = take(&mut leases, idle, 1, &ledger)[0];
        assert_eq!(lease.part, Part { from: 5 * pass, to: Part::OPEN });
        reader = idle;
    }
    assert_eq!(
        when_idle(&mut leases, 1 - reader, &ledger),
        Grant::Now { leases: vec![], none_left: true, when_idle: false },
        "round and round"
    );
}

#[test]
fn who_gave_back_all_has_nothing_left_and_the_other_has_it_whole() {
    let ledger = Ledger::new(1);
    let mut leases = Leases::new(1, &[Source::unnamed(1)], Some(1), &ledger);
    leases.deal_among(2);
    let first = take(&mut leases, 0, 1, &ledger)[0].id;
    assert_eq!(when_idle(&mut leases, 1, &ledger), Grant::AskBack { holder: WorkerId(0), lease: first });
    leases.give_back(first, 0);
    assert_eq!(leases.held_by(WorkerId(0)), []);
    assert_eq!(take(&mut leases, 1, 1, &ledger)[0].part, Part::WHOLE);
}

#[test]
fn shard_that_is_set_aside_comes_when_there_is_nothing_else_or_when_it_is_taken_up() {
    for is_taken_up in [false, true] {
        let ledger = Ledger::new(4);
        let mut leases = Leases::new(1, &[Source::unnamed(4)], Some(1), &ledger);
        leases.deal_among(1);
        let first = take(&mut leases, 0, 1, &ledger)[0];
        leases.set_aside(first.epoch, first.shard);
        leases.release(WorkerId(0));
        leases.deal_among(1);
        if is_taken_up {
            leases.take_up(first.epoch, first.shard);
        }
        let order: Vec<ShardId> = drain(&mut leases, 1, &ledger)[0].iter().map(|&(_, shard)| ShardId(shard)).collect();
        assert_eq!(order.len(), 4);
        assert_eq!(order.iter().position(|&shard| shard == first.shard), Some(if is_taken_up { 0 } else { 3 }));
        assert!(!leases.any_left());
    }
}

#[test]
fn a_dead_holders_shards_go_to_the_next_who_asks() {
    let ledger = Ledger::new(4);
    let mut leases = Leases::new(1, &[Source::unnamed(4)], Some(1), &ledger);
    leases.deal_among(2);
    let lost = take(&mut leases, 1, 2, &ledger);
    leases.release(WorkerId(1));
    assert_eq!(leases.shard_of(lost[0].id, WorkerId(1)), None);
    leases.deal_among(1);
    let all = take(&mut leases, 0, 10, &ledger);
    assert_eq!(all.len(), 4);
    assert!(all.iter().all(|lease| lost.iter().all(|old| old.id != lease.id)), "lease ids are never reused");
}

#[test]
fn change_of_size_loses_and_doubles_nothing() {
    let ledger = Ledger::new(11);
    let mut leases = Leases::new(5, &[Source::unnamed(11)], Some(2), &ledger);
    let mut all = Vec::new();
    leases.deal_among(3);
    // Uneven progress: member 2 is far ahead when the world shrinks, then grows.
    all.extend(take(&mut leases, 2, 3, &ledger));
    all.extend(take(&mut leases, 0, 1, &ledger));
    leases.deal_among(1);
    all.extend(take(&mut leases, 0, 2, &ledger));
    leases.deal_among(4);
    for member in [3, 1, 0, 2, 1] {
        all.extend(take(&mut leases, member, 5, &ledger));
        all.iter().for_each(|lease| leases.set_read(lease.id));
    }
    let mut places: Vec<_> = all.iter().map(|lease| (lease.epoch, lease.shard)).collect();
    places.sort();
    places.dedup();
    assert_eq!((places.len(), all.len()), (22, 22));
}

#[test]
fn shards_done_before_a_resume_are_not_granted() {
    let mut ledger = Ledger::new(3);
    ledger.set_size(Epoch(0), ShardId(1), 1).unwrap();
    ledger.commit(SampleName { epoch: Epoch(0), shard: ShardId(1), index: 0 }, Step(1)).unwrap();
    let mut leases = Leases::new(1, &[Source::unnamed(3)], Some(1), &ledger);
    leases.deal_among(2);
    let mut shards: Vec<_> = drain(&mut leases, 2, &ledger).concat();
    shards.sort_unstable();
    assert_eq!(shards, [(0, 0), (0, 2)]);
}

#[test]
fn finished_lease_is_nobodys() {
    let ledger = Ledger::new(2);
    let mut leases = Leases::new(1, &[Source::unnamed(2)], Some(1), &ledger);
    leases.deal_among(1);
    let lease = take(&mut leases, 0, 1, &ledger)[0];
    assert_eq!(leases.holders_of(lease.epoch, lease.shard), [WorkerId(0)]);
    leases.finish(lease.epoch, lease.shard);
    assert!(leases.holders_of(lease.epoch, lease.shard).is_empty() && leases.held_by(WorkerId(0)).is_empty());
}
