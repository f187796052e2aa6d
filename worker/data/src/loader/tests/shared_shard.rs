//! Shards of which several loaders read a part each: what is given back, to whom it may concern, and what is kept.

use super::*;
use crate::caption::Caption;
use crate::sample::{Encoded, Stored};
use state::Buffered;

/// What was given back: the lease, and from where on.
fn given_back(rig: &Rig) -> (LeaseId, u32) {
    loop {
        if let LoaderEvent::GaveBack { lease, from } = rig.events.recv_timeout(PATIENCE).unwrap() {
            return (lease, from);
        }
    }
}

fn indices(shares: &[Share]) -> Vec<u32> {
    let mut indices: Vec<u32> = names(shares).iter().map(|name| name.index).collect();
    indices.sort_unstable();
    indices
}

#[test]
fn lease_on_a_part_is_read_up_to_its_end_and_no_further() {
    let folder = tempfile::tempdir().unwrap();
    let mut part = lease(0, 0, &write_shard(folder.path(), 0, &[Kind::Good; 10]));
    for index in 0..3 {
        part.done.insert(index);
    }
    part.end = Some(7);
    let mut rig = Rig::start(config(4, 1));
    rig.handle.grant(vec![part], true);
    assert_eq!(indices(&rig.drain(3)), [3, 4, 5, 6]);
    assert_eq!(given_back(&rig), (LeaseId(100), 7));
    assert!(rig.all_skips().is_empty(), "and its size is for the reader of the other part to say");
}

#[test]
fn rest_that_is_given_back_begins_where_what_is_handed_out_ends() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(4, 1);
    // A single sample fills what is read ahead.
    config.data.buffer_bytes = 4;
    let mut rig = Rig::start(config);
    let leases: Vec<_> = (0..2).map(|shard| lease(shard, 0, &write_shard(folder.path(), shard, &[Kind::Good; 40]))).collect();
    let second = leases[1].clone();
    rig.handle.answer(leases, Outlook::More);
    let mut shares = vec![rig.loader.next_share(2).unwrap()];
    rig.handle.give_back(&[LeaseId(100), LeaseId(101)], false);
    let first = given_back(&rig);
    assert_eq!((first.0, given_back(&rig)), (LeaseId(100), (LeaseId(101), 0)), "the second was not begun");
    rig.handle.give_back(&[LeaseId(100)], false);
    // Sent once more, by a coordinator that was started again and has not heard of it: it is another's by now.
    rig.handle.answer(vec![second], Outlook::Nothing);
    shares.extend(rig.drain(2));
    assert!((2..40).contains(&first.1), "from {}", first.1);
    assert_eq!(indices(&shares), (0..first.1).collect::<Vec<_>>());
    assert!(rig.events.try_iter().all(|event| !matches!(event, LoaderEvent::GaveBack { .. })), "it is said once");
}

#[test]
fn reader_leaves_to_others_what_its_own_shares_will_not_need_for_long() {
    let folder = tempfile::tempdir().unwrap();
    let mut rig = Rig::start(config(4, 1));
    rig.handle.grant(vec![lease(0, 0, &write_shard(folder.path(), 0, &[Kind::Good; 300]))], true);
    let mut shares = vec![rig.loader.next_share(2).unwrap()];
    while rig.handle.stats().buffered_samples < 64 {
        std::thread::yield_now();
    }
    // It would have read the rest by then.
    std::thread::sleep(Duration::from_millis(100));
    let stats = rig.handle.stats();
    assert!(stats.buffered_samples <= 70 && !stats.is_at_end, "{stats:?}");
    shares.extend(rig.drain(2));
    assert_eq!(indices(&shares), (0..300).collect::<Vec<_>>());
}

#[test]
fn lease_that_has_not_come_yet_is_given_back_whole_and_not_read_when_it_comes() {
    let folder = tempfile::tempdir().unwrap();
    let mut rig = Rig::start(config(4, 1));
    rig.handle.give_back(&[LeaseId(100)], false);
    assert_eq!(given_back(&rig), (LeaseId(100), 0));
    let late = lease(0, 0, &write_shard(folder.path(), 0, &[Kind::Good; 3]));
    rig.handle.grant(vec![late], true);
    assert!(rig.drain(2).is_empty());
}

#[test]
fn loader_that_runs_dry_asks_once_more_before_it_cuts_a_share_short() {
    let folder = tempfile::tempdir().unwrap();
    let mut rig = Rig::start(config(4, 1));
    let first = lease(0, 0, &write_shard(folder.path(), 0, &[Kind::Good; 3]));
    rig.handle.answer(vec![first], Outlook::WhenIdle);
    let handle = rig.handle.clone();
    let second = lease(1, 0, &write_shard(folder.path(), 1, &[Kind::Good; 2]));
    let events = std::mem::replace(&mut rig.events, channel().1);
    let answers = std::thread::spawn(move || {
        let is_idle = |event: &LoaderEvent| matches!(event, LoaderEvent::NeedLeases { num: 1, is_idle: true });
        let mut asked = events.into_iter().filter(is_idle);
        asked.next().unwrap();
        handle.answer(vec![second], Outlook::WhenIdle);
        asked.next().unwrap();
        handle.answer(Vec::new(), Outlook::Nothing);
    });
    assert_eq!(rig.drain(4).iter().map(Share::num_samples).collect::<Vec<_>>(), [4, 1]);
    answers.join().unwrap();
}

fn read_of(lease: u32, index: u32) -> Buffered {
    let name = SampleName { epoch: Epoch(0), shard: ShardId(lease), index };
    let caption = Caption { prompt: String::new(), english: String::new(), native: false };
    let encoded = Encoded { stored: Stored::Latents(Vec::new()), size: (16, 16), bucket: 0, caption };
    Buffered { name, lease: LeaseId(u64::from(lease) + 100), key: String::new(), encoded }
}

/// The state of a loader whose trainer waits for a share of three, with two leases.
fn waiting_for_three() -> State {
    let mut state = State::new(&config(2, 1));
    state.grant((0..2).map(|number| lease(number, 0, "nowhere")).collect(), Outlook::WhenIdle);
    assert!(state.take_share(3).is_none());
    state
}

#[test]
fn reader_that_is_asked_for_its_last_lease_before_it_has_begun_keeps_a_share_of_it() {
    for has_begun in [false, true] {
        let mut state = waiting_for_three();
        assert_eq!(state.give_back(LeaseId(101), true), Some(0), "there is another to read");
        if has_begun {
            state.begin_lease().unwrap();
        }
        assert_eq!(state.give_back(LeaseId(100), true), None);
        if !has_begun {
            state.begin_lease().unwrap();
        }
        for index in 0..2 {
            state.push(read_of(0, index));
            assert_eq!(state.cut_wanted(), None, "two are no share");
        }
        state.push(read_of(0, 2));
        assert_eq!(state.cut_wanted(), Some((LeaseId(100), 3)));
        assert_eq!((state.cut_wanted(), state.is_cut()), (None, true), "it is said once");
    }
}

#[test]
fn reader_that_leaves_keeps_nothing_that_it_has_not_read() {
    let mut state = waiting_for_three();
    state.begin_lease().unwrap();
    assert_eq!([100, 101].map(|lease| state.give_back(LeaseId(lease), false)), [Some(0), Some(0)]);
    assert!(state.is_cut() && state.cut_wanted().is_none());
}

#[test]
fn reader_that_has_a_share_gives_back_what_it_has_read_beyond_its_shuffle_buffer() {
    let mut state = waiting_for_three();
    state.begin_lease().unwrap();
    (0..20).for_each(|index| state.push(read_of(0, index)));
    // Three shares are planned, and two samples are in the shuffle buffer.
    assert_eq!(state.give_back(LeaseId(100), true), Some(11));
    assert_eq!(state.stats().buffered_samples + state.stats().planned_samples, 11);
}

#[test]
fn lease_that_ends_before_it_makes_a_share_is_not_given_back_and_neither_is_the_next() {
    let mut state = waiting_for_three();
    assert_eq!(state.give_back(LeaseId(101), true), Some(0));
    assert_eq!(state.give_back(LeaseId(100), true), None);
    state.begin_lease().unwrap();
    state.push(read_of(0, 0));
    state.end_lease();
    state.grant(vec![lease(2, 0, "nowhere")], Outlook::WhenIdle);
    state.begin_lease().unwrap();
    (0..20).for_each(|index| state.push(read_of(2, index)));
    assert_eq!((state.cut_wanted(), state.is_cut()), (None, false));
}
