//! One suite for every backend: what [`Collective`] promises, as tests.
//!
//! A backend's tests call [`conformance_suite!`](crate::conformance_suite) with a function that makes a whole world in this process, and
//! the world sizes it can make. Members run as threads. No test sleeps: each waits for a state, and a hang fails by a deadline.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests of several backends link it, and a panic is how a test fails")]

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::{AbortHandle, Collective, Error};

/// Makes the members of a world of the given size, in order, ready to use. Each has an abort handle of its own, as separate processes do.
pub type MakeWorld = fn(num_members: u32) -> Vec<Box<dyn Collective>>;

/// Makes one `#[test]` of every case: `conformance_suite!(make_world, [1, 2, 3, 5])`.
#[macro_export]
macro_rules! conformance_suite {
    ($make_world:expr, $world_sizes:expr) => {
        $crate::conformance_suite! {
            @cases $make_world, $world_sizes,
            members_know_their_place,
            integers_of_one_writer_arrive_exactly,
            sums_are_right_and_bit_identical_at_any_length,
            data_larger_than_socket_buffers_passes,
            many_collectives_run_in_a_row,
            every_member_can_be_the_root_of_a_broadcast,
            a_barrier_waits_for_everyone,
            an_abort_breaks_a_call_that_waits_for_a_member,
            an_abort_breaks_a_call_that_moves_data,
            a_dropped_member_fails_the_others_at_once,
            a_deadline_ends_the_wait_for_a_silent_member,
            other_lengths_are_an_error_for_all,
            other_operations_are_an_error_for_all,
            a_root_outside_the_world_is_refused,
        }
    };
    (@cases $make_world:expr, $world_sizes:expr, $($case:ident),+ $(,)?) => {
        $(
            #[test]
            fn $case() {
                for num_members in $world_sizes {
                    $crate::conformance::$case($make_world, num_members);
                }
            }
        )+
    };
}

/// Far more than anything here takes; only a hang gets there.
const PATIENCE: Duration = Duration::from_secs(60);

/// Far below any deadline of these tests. It takes milliseconds; a machine that is busy with other tests takes its time.
pub(crate) const ABORT_LATENCY: Duration = Duration::from_secs(5);

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

/// Runs `work` on every member at the same time. Returns the members and the results, in order.
fn together<R: Send>(
    world: Vec<Box<dyn Collective>>,
    work: impl Fn(&mut dyn Collective) -> R + Sync,
) -> (Vec<Box<dyn Collective>>, Vec<R>) {
    thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = world
            .into_iter()
            .map(|mut member| {
                scope.spawn(move || {
                    let result = work(&mut *member);
                    (member, result)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a member panicked")).unzip()
    })
}

/// A small generator of repeatable numbers (splitmix64).
pub struct Random(u64);

impl Random {
    /// Starts the sequence of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Draws from `0..bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    /// Draws from -1..1.
    pub fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// The contribution of one member: anybody can compute it again.
fn contribution(seed: u64, member_index: u32, len: usize) -> Vec<f32> {
    let mut random = Random::new(seed ^ (u64::from(member_index) << 32));
    (0..len).map(|_| random.unit()).collect()
}

/// Every member has its own index and knows how many there are.
pub fn members_know_their_place(make_world: MakeWorld, num_members: u32) {
    let places: Vec<_> = make_world(num_members).iter().map(|member| (member.member_index(), member.num_members())).collect();
    assert_eq!(places, (0..num_members).map(|index| (index, num_members)).collect::<Vec<_>>());
}

/// A slot that one member fills with an integer below 2^24, and the others with 0, comes out exactly.
pub fn integers_of_one_writer_arrive_exactly(make_world: MakeWorld, num_members: u32) {
    const SLOTS: usize = 1000;
    let value = |member: usize, slot: usize| ((1 << 24) - 1 - member * 7919 - slot * 31) as f32;
    let (_, sums) = together(make_world(num_members), |member| {
        let own = member.member_index() as usize;
        let mut data = vec![0.0; SLOTS * num_members as usize];
        data[own * SLOTS..][..SLOTS].iter_mut().enumerate().for_each(|(slot, element)| *element = value(own, slot));
        member.all_reduce_sum(&mut data, soon()).unwrap();
        data
    });
    let expected: Vec<f32> = (0..num_members as usize).flat_map(|member| (0..SLOTS).map(move |slot| value(member, slot))).collect();
    assert!(sums.iter().all(|sum| *sum == expected));
}

/// Sums are right to rounding, have the same bits on every member, and the same bits when repeated.
pub fn sums_are_right_and_bit_identical_at_any_length(make_world: MakeWorld, num_members: u32) {
    let mut random = Random::new(3);
    let n = num_members as usize;
    let lengths = [0, 1, n - 1, n, n + 1, 1 + random.below(100), random.below(10_000), random.below(300_000)];
    let (_, results) = together(make_world(num_members), |member| {
        let mut sums = Vec::new();
        for _repetition in 0..2 {
            for (seed, len) in (0..).zip(lengths) {
                let mut data = contribution(seed, member.member_index(), len);
                member.all_reduce_sum(&mut data, soon()).unwrap();
                sums.push(data);
            }
        }
        sums
    });
    let bits = |sum: &[f32]| sum.iter().map(|element| element.to_bits()).collect::<Vec<_>>();
    for (seed, len) in (0..).zip(lengths) {
        let reference = &results[0][seed as usize];
        assert_eq!(reference.len(), len);
        for sums in &results {
            assert!(bits(&sums[seed as usize]) == bits(reference), "members differ at length {len}");
            assert!(bits(&sums[seed as usize + lengths.len()]) == bits(reference), "repetitions differ at length {len}");
        }
        let terms: Vec<_> = (0..num_members).map(|member| contribution(seed, member, len)).collect();
        for (index, sum) in reference.iter().enumerate() {
            let exact: f64 = terms.iter().map(|term| f64::from(term[index])).sum();
            assert!((f64::from(*sum) - exact).abs() < 1e-6 * f64::from(num_members), "{sum} instead of {exact} at {index} of {len}");
        }
    }
}

/// Data that no kernel buffers whole does not lock members that all send and receive.
pub fn data_larger_than_socket_buffers_passes(make_world: MakeWorld, num_members: u32) {
    const LEN: usize = 6_000_011; // 24 MB: a real job's gradient, and a prime-ish length
    let (_, sums) = together(make_world(num_members), |member| {
        let own = member.member_index() as usize;
        let mut data: Vec<f32> = (0..LEN).map(|index| ((index + own) % 4096) as f32).collect();
        member.all_reduce_sum(&mut data, soon()).unwrap();
        data.iter().enumerate().all(|(index, sum)| *sum == (0..num_members as usize).map(|m| ((index + m) % 4096) as f32).sum::<f32>())
    });
    assert!(sums.into_iter().all(|is_right| is_right));
}

/// Calls of all kinds follow each other on one communicator.
pub fn many_collectives_run_in_a_row(make_world: MakeWorld, num_members: u32) {
    together(make_world(num_members), |member| {
        for round in 0..200u32 {
            let mut data = vec![round as f32; 1 + round as usize % 7];
            member.all_reduce_sum(&mut data, soon()).unwrap();
            assert!(data.iter().all(|element| *element == (round * num_members) as f32));
            let root = round % num_members;
            let mut bytes = [if member.member_index() == root { round as u8 } else { 0xff }; 5];
            member.broadcast(&mut bytes, root, soon()).unwrap();
            assert_eq!(bytes, [round as u8; 5]);
            if round % 10 == 0 {
                member.barrier(soon()).unwrap();
            }
        }
    });
}

/// A broadcast gives everybody the root's bytes, at any length.
pub fn every_member_can_be_the_root_of_a_broadcast(make_world: MakeWorld, num_members: u32) {
    together(make_world(num_members), |member| {
        for root in 0..num_members {
            for len in [0, 1, 1000, 3_000_001] {
                let content = |index: usize, of: u32| (index as u32 % 251 + of) as u8;
                let mut data: Vec<u8> = (0..len).map(|index| content(index, member.member_index())).collect();
                member.broadcast(&mut data, root, soon()).unwrap();
                assert!(data.iter().enumerate().all(|(index, byte)| *byte == content(index, root)), "root {root}, {len} bytes");
            }
        }
    });
}

/// Nobody leaves a barrier before everybody has entered it.
pub fn a_barrier_waits_for_everyone(make_world: MakeWorld, num_members: u32) {
    let num_entered = AtomicU32::new(0);
    together(make_world(num_members), |member| {
        for round in 1..=50 {
            num_entered.fetch_add(1, Ordering::SeqCst);
            member.barrier(soon()).unwrap();
            assert!(num_entered.load(Ordering::SeqCst) >= round * num_members);
        }
    });
}

/// Aborting every member ends the calls of those who wait for one that never enters, and all later calls.
pub fn an_abort_breaks_a_call_that_waits_for_a_member(make_world: MakeWorld, num_members: u32) {
    let mut world = make_world(num_members);
    let mut absent = world.pop().unwrap();
    abort_while(world, |member| member.all_reduce_sum(&mut [1.0; 1000], soon()));
    absent.abort_handle().abort("test");
    assert_aborted(absent.barrier(soon()));
}

/// An abort between and within transfers ends them.
pub fn an_abort_breaks_a_call_that_moves_data(make_world: MakeWorld, num_members: u32) {
    abort_while(make_world(num_members), |member| {
        let mut data = vec![0.0; 1_000_000];
        loop {
            member.all_reduce_sum(&mut data, soon())?;
        }
    });
}

/// Aborts all members, one after the other, once they have started `work`, and checks what they get.
fn abort_while(world: Vec<Box<dyn Collective>>, work: impl Fn(&mut dyn Collective) -> Result<(), Error> + Sync) {
    let handles: Vec<AbortHandle> = world.iter().map(|member| member.abort_handle()).collect();
    let num_members = world.len();
    let (started, starts) = mpsc::channel();
    let (aborted_at, ends) = thread::scope(|scope| {
        let aborter = scope.spawn(move || {
            starts.iter().take(num_members).for_each(drop);
            let aborted_at = Instant::now();
            handles.iter().for_each(|handle| handle.abort("test"));
            aborted_at
        });
        let (world, ends) = together(world, |member| {
            started.send(()).unwrap();
            (work(member), Instant::now())
        });
        let aborted_at = aborter.join().unwrap();
        for mut member in world {
            assert_aborted(member.all_reduce_sum(&mut [], soon()));
            assert_aborted(member.broadcast(&mut [], 0, soon()));
            assert_aborted(member.barrier(soon()));
        }
        (aborted_at, ends)
    });
    for (index, (outcome, ended_at)) in ends.into_iter().enumerate() {
        let latency = ended_at.saturating_duration_since(aborted_at);
        assert!(latency < ABORT_LATENCY, "member {index} returned {latency:?} after the abort");
        match outcome {
            Err(Error::Aborted { reason }) => assert_eq!(reason, "test"),
            // The first abort closes links, which a neighbour may notice before its own abort reaches it.
            Err(Error::PeerLost { .. }) if index > 0 => {}
            other => panic!("member {index}: {other:?}"),
        }
    }
}

fn assert_aborted(outcome: Result<(), Error>) {
    assert!(matches!(&outcome, Err(Error::Aborted { reason }) if reason == "test"), "{outcome:?}");
}

/// A member that goes away fails the others' running call, without a deadline's help.
pub fn a_dropped_member_fails_the_others_at_once(make_world: MakeWorld, num_members: u32) {
    let mut world = make_world(num_members);
    let lost = world.pop().unwrap();
    let num_left = world.len();
    let (started, starts) = mpsc::channel();
    thread::scope(|scope| {
        let dropper = scope.spawn(move || {
            starts.iter().take(num_left).for_each(drop);
            drop(lost);
            Instant::now()
        });
        let (world, ends) = together(world, |member| {
            started.send(()).unwrap();
            (member.all_reduce_sum(&mut vec![1.0; 100_000], soon()), Instant::now())
        });
        let dropped_at = dropper.join().unwrap();
        for (outcome, ended_at) in ends {
            assert!(matches!(outcome, Err(Error::PeerLost { .. })), "{outcome:?}");
            let latency = ended_at.saturating_duration_since(dropped_at);
            assert!(latency < ABORT_LATENCY, "noticed after {latency:?}");
        }
        assert_poisoned(world);
    });
}

/// A member that is there but never enters ends the others' wait at their deadline.
pub fn a_deadline_ends_the_wait_for_a_silent_member(make_world: MakeWorld, num_members: u32) {
    let mut world = make_world(num_members);
    let _silent = world.pop().unwrap();
    if world.is_empty() {
        return;
    }
    let deadline = Instant::now() + Duration::from_millis(100);
    let (world, ends) = together(world, |member| (member.all_reduce_sum(&mut [1.0; 100], deadline), Instant::now()));
    assert!(ends.iter().any(|(outcome, _)| matches!(outcome, Err(Error::Timeout { .. }))), "{ends:?}");
    for (outcome, ended_at) in ends {
        // Who wakes up first closes its links: a neighbour may see that before its own clock.
        assert!(matches!(outcome, Err(Error::Timeout { .. } | Error::PeerLost { .. })), "{outcome:?}");
        assert!(ended_at >= deadline && ended_at < deadline + PATIENCE / 6);
    }
    assert_poisoned(world);
}

/// Members that pass different lengths all get an error.
pub fn other_lengths_are_an_error_for_all(make_world: MakeWorld, num_members: u32) {
    if num_members > 1 {
        all_fail_out_of_step(make_world(num_members), |member| {
            let len = if member.member_index() == 0 { 100_000 } else { 100_001 };
            member.all_reduce_sum(&mut vec![1.0; len], soon())
        });
    }
}

/// Members that call different operations, or name different roots, all get an error.
pub fn other_operations_are_an_error_for_all(make_world: MakeWorld, num_members: u32) {
    if num_members > 1 {
        all_fail_out_of_step(make_world(num_members), |member| match member.member_index() {
            0 => member.barrier(soon()),
            _ => member.broadcast(&mut [1; 10], 0, soon()),
        });
        all_fail_out_of_step(make_world(num_members), |member| member.broadcast(&mut [0; 10], member.member_index(), soon()));
        // A member that lacks nothing may return from an empty broadcast; it learns of the others with its next call.
        all_fail_out_of_step(make_world(num_members), |member| {
            if member.member_index() > 0 {
                member.broadcast(&mut [], 0, soon())?;
            }
            member.barrier(soon())
        });
    }
}

fn all_fail_out_of_step(world: Vec<Box<dyn Collective>>, work: impl Fn(&mut dyn Collective) -> Result<(), Error> + Sync) {
    let (world, outcomes) = together(world, work);
    assert!(outcomes.iter().any(|outcome| matches!(outcome, Err(Error::Mismatch { .. }))), "{outcomes:?}");
    for outcome in outcomes {
        assert!(matches!(outcome, Err(Error::Mismatch { .. } | Error::PeerLost { .. })), "{outcome:?}");
    }
    assert_poisoned(world);
}

/// After an error every call fails, at once.
fn assert_poisoned(world: Vec<Box<dyn Collective>>) {
    for mut member in world {
        for outcome in [member.all_reduce_sum(&mut [1.0], soon()), member.broadcast(&mut [1], 0, soon()), member.barrier(soon())] {
            assert!(matches!(outcome, Err(Error::Poisoned { .. })), "{outcome:?}");
        }
    }
}

/// A broadcast from nobody is refused before anything is sent.
pub fn a_root_outside_the_world_is_refused(make_world: MakeWorld, num_members: u32) {
    let (world, outcomes) = together(make_world(num_members), |member| member.broadcast(&mut [1], num_members, soon()));
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Err(Error::InvalidArgument { .. }))), "{outcomes:?}");
    assert_poisoned(world);
}
