//! The engine on GPUs made of memory: the conformance suite, and what only NCCL does.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Condvar, Mutex};

use super::*;
use crate::DeviceValues;
use crate::tcp::tests::members;

/// What all GPUs of a world share.
#[derive(Default)]
struct World {
    num_members: usize,
    /// What each member launched, by the number of the operation.
    rounds: Mutex<BTreeMap<usize, Vec<Option<Vec<u8>>>>>,
}

/// A GPU whose faults are chosen by the test.
#[derive(Default)]
struct FakeGpu {
    world: Arc<World>,
    member: usize,
    buffer: Mutex<Vec<u8>>,
    launched: AtomicU32,
    root: Mutex<Option<usize>>,
    /// Where the sum is wanted, if not in the buffer.
    in_place: Mutex<Option<DeviceValues>>,
    /// Answers "busy" so many times more.
    busy: AtomicU32,
    /// Answers "busy" for ever.
    is_stuck: AtomicBool,
    /// Never comes to a sum that it was given.
    computes_for_ever: AtomicBool,
    /// What goes wrong once nothing is busy any more.
    fault: Mutex<Option<&'static str>>,
    num_aborts: AtomicU32,
    abort_hangs: AtomicBool,
    marks: AtomicU32,
    uploads: AtomicU32,
    downloads: AtomicU32,
}

impl FakeGpu {
    fn launch(&self, len: usize, root: Option<usize>) -> Result<(), Fault> {
        let contribution = self.buffer.lock().unwrap()[..len].to_vec();
        self.launch_with(contribution, root, None)
    }

    fn launch_with(&self, contribution: Vec<u8>, root: Option<usize>, in_place: Option<DeviceValues>) -> Result<(), Fault> {
        *self.root.lock().unwrap() = root;
        *self.in_place.lock().unwrap() = in_place;
        let round = self.launched.fetch_add(1, Ordering::SeqCst) as usize;
        let mut rounds = self.world.rounds.lock().unwrap();
        let places = rounds.entry(round).or_insert_with(|| vec![None; self.world.num_members]);
        places[self.member] = Some(contribution);
        // Everybody has met after the round before the last one.
        rounds.retain(|&number, _| number + 2 > round);
        Ok(())
    }

    fn round(&self) -> usize {
        self.launched.load(Ordering::SeqCst) as usize - 1
    }

    /// What has come out of the last operation.
    fn outcome(&self, bytes: &mut [u8]) {
        let rounds = self.world.rounds.lock().unwrap();
        let parts: Vec<&Vec<u8>> = rounds[&self.round()].iter().flatten().collect();
        match *self.root.lock().unwrap() {
            Some(root) => bytes.copy_from_slice(parts[root]),
            None => {
                for (at, place) in bytes.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                    let value = |part: &&Vec<u8>| f32::from_le_bytes(part.as_chunks::<4>().0[at]);
                    *place = parts.iter().map(value).sum::<f32>().to_le_bytes();
                }
            }
        }
    }
}

impl Gpu for FakeGpu {
    fn unique_id(&self) -> Result<[u8; UNIQUE_ID_BYTES], Fault> {
        Ok([42; UNIQUE_ID_BYTES])
    }

    fn start(&self, id: &[u8; UNIQUE_ID_BYTES], _num_members: u32, _member_index: u32) -> Result<Comm, Fault> {
        assert_eq!(*id, [42; UNIQUE_ID_BYTES], "the id that member 0 made");
        Ok(Comm(1))
    }

    fn progress(&self, _comm: Comm) -> Result<Progress, Fault> {
        if self.is_stuck.load(Ordering::SeqCst) {
            return Ok(Progress::Busy);
        }
        if self.busy.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |busy| busy.checked_sub(1)).is_ok() {
            return Ok(Progress::Busy);
        }
        match *self.fault.lock().unwrap() {
            Some(answer) => Err(Fault { doing: "go on in NCCL", answer: answer.into() }),
            None => Ok(Progress::Idle),
        }
    }

    fn upload(&self, bytes: &[u8]) -> Result<(), Fault> {
        self.uploads.fetch_add(1, Ordering::SeqCst);
        *self.buffer.lock().unwrap() = bytes.to_vec();
        Ok(())
    }

    fn reserve(&self, num_bytes: usize) -> Result<(), Fault> {
        let mut buffer = self.buffer.lock().unwrap();
        let num_bytes = buffer.len().max(num_bytes);
        buffer.resize(num_bytes, 0xee);
        Ok(())
    }

    fn trim(&self, num_bytes: usize) -> Result<(), Fault> {
        let mut buffer = self.buffer.lock().unwrap();
        if buffer.len() > num_bytes {
            *buffer = Vec::new();
        }
        Ok(())
    }

    fn all_reduce(&self, _comm: Comm, num_values: usize) -> Result<(), Fault> {
        self.launch(num_values * size_of::<f32>(), None)
    }

    fn all_reduce_in_place(&self, _comm: Comm, values: DeviceValues) -> Result<(), Fault> {
        assert_eq!(values.stream, STREAM);
        // SAFETY: the tests' values lie in this process's memory until the operation is over, and nobody else looks at them.
        let contribution = unsafe { std::slice::from_raw_parts(values.address as *const u8, values.num_values * 4) }.to_vec();
        self.launch_with(contribution, None, Some(values))
    }

    fn has_come_to_sum(&self) -> Result<bool, Fault> {
        Ok(!self.computes_for_ever.load(Ordering::SeqCst))
    }

    fn broadcast(&self, _comm: Comm, num_bytes: usize, root: u32) -> Result<(), Fault> {
        self.launch(num_bytes, Some(root as usize))
    }

    fn mark(&self) -> Result<(), Fault> {
        assert_eq!(self.busy.load(Ordering::SeqCst), 0, "a mark before the work is on the stream");
        self.marks.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn is_past_mark(&self) -> Result<bool, Fault> {
        let is_done = self.world.rounds.lock().unwrap()[&self.round()].iter().all(Option::is_some);
        if is_done && let Some(values) = self.in_place.lock().unwrap().take() {
            // SAFETY: as when they were read.
            self.outcome(unsafe { std::slice::from_raw_parts_mut(values.address as *mut u8, values.num_values * 4) });
        }
        Ok(is_done)
    }

    fn download(&self, bytes: &mut [u8]) -> Result<(), Fault> {
        self.downloads.fetch_add(1, Ordering::SeqCst);
        self.outcome(bytes);
        Ok(())
    }

    fn abort(&self, _comm: Comm) -> Result<(), Fault> {
        self.num_aborts.fetch_add(1, Ordering::SeqCst);
        if self.abort_hangs.load(Ordering::SeqCst) {
            let (forever, mutex) = (Condvar::new(), Mutex::new(()));
            drop(forever.wait_while(mutex.lock().unwrap(), |()| true));
        }
        Ok(())
    }
}

/// What values in place are said to be made on.
const STREAM: u64 = 7;
const SHORT: Duration = Duration::from_millis(200);

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn gpus(num_members: u32) -> Vec<Arc<FakeGpu>> {
    let world = Arc::new(World { num_members: num_members as usize, ..World::default() });
    (0..num_members as usize).map(|member| Arc::new(FakeGpu { world: Arc::clone(&world), member, ..FakeGpu::default() })).collect()
}

/// Builds every member's end at the same time.
fn connect(gpus: &[Arc<FakeGpu>], deadline: Instant) -> Vec<Result<Engine<FakeGpu>, Error>> {
    let controls = members(gpus.len() as u32);
    thread::scope(|scope| {
        let connecting: Vec<_> = controls
            .into_iter()
            .zip(gpus)
            .map(|(control, gpu)| scope.spawn(move || Engine::connect(control, Arc::clone(gpu), SHORT, deadline)))
            .collect();
        connecting.into_iter().map(|member| member.join().unwrap()).collect()
    })
}

fn world(num_members: u32) -> Vec<Box<dyn Collective>> {
    connect(&gpus(num_members), soon()).into_iter().map(|member| -> Box<dyn Collective> { Box::new(member.unwrap()) }).collect()
}

mod suite {
    crate::conformance_suite!(super::world, [1, 2, 3]);
}

/// A member that sums in place whatever it is given: on these GPUs the memory of this process is that of the device.
struct InPlace(Engine<FakeGpu>);

impl Collective for InPlace {
    fn member_index(&self) -> u32 {
        self.0.member_index()
    }

    fn num_members(&self) -> u32 {
        self.0.num_members()
    }

    fn all_reduce_sum_in(&mut self, values: Values<'_>, deadline: Instant) -> Result<(), Error> {
        assert!(self.0.sums_on_device());
        let Values::Host(values) = values else { panic!("on a device already") };
        // SAFETY: borrowed until the call has returned.
        let values = unsafe { DeviceValues::new(values.as_mut_ptr() as u64, values.len(), STREAM) };
        self.0.all_reduce_sum_in(Values::Device(values), deadline)
    }

    fn broadcast(&mut self, data: &mut [u8], root: u32, deadline: Instant) -> Result<(), Error> {
        self.0.broadcast(data, root, deadline)
    }

    fn barrier(&mut self, deadline: Instant) -> Result<(), Error> {
        self.0.barrier(deadline)
    }

    fn abort_handle(&self) -> AbortHandle {
        self.0.abort_handle()
    }
}

fn world_in_place(num_members: u32) -> Vec<Box<dyn Collective>> {
    whole(&gpus(num_members)).into_iter().map(|member| -> Box<dyn Collective> { Box::new(InPlace(member)) }).collect()
}

mod suite_in_place {
    crate::conformance_suite!(super::world_in_place, [1, 2, 3]);
}

/// Where values lie is each member's own affair: one sums in place, the other a copy.
#[test]
fn sums_in_place_meet_sums_of_copies() {
    let gpus = gpus(2);
    let mut world = whole(&gpus).into_iter();
    let (first, mut second) = (world.next().unwrap(), world.next().unwrap());
    let mut first = InPlace(first);
    let ([mut one, mut other], deadline) = ([[1.0, 2.0], [10.0, 20.0]], soon());
    thread::scope(|scope| {
        scope.spawn(|| first.all_reduce_sum(&mut one, deadline).unwrap());
        second.all_reduce_sum(&mut other, deadline).unwrap();
    });
    assert_eq!((one, other), ([11.0, 22.0], [11.0, 22.0]));
    assert_eq!(gpus.iter().map(|gpu| gpu.downloads.load(Ordering::SeqCst)).collect::<Vec<_>>(), [0, 1]);
}

/// Every copy of the weights takes its time on each GPU: one way where they come from, the other way where they go to.
#[test]
fn a_broadcast_is_copied_up_at_its_root_and_down_elsewhere_and_leaves_no_large_buffer() {
    let gpus = gpus(3);
    let mut world = whole(&gpus);
    for (num_bytes, kept) in [(10, 10), (KEPT_BYTES + 1, 0)] {
        gpus.iter().for_each(|gpu| [&gpu.uploads, &gpu.downloads].iter().for_each(|count| count.store(0, Ordering::SeqCst)));
        thread::scope(|scope| {
            for (index, member) in world.iter_mut().enumerate() {
                scope.spawn(move || {
                    let mut data = vec![index as u8; num_bytes];
                    member.broadcast(&mut data, 1, soon()).unwrap();
                    assert!(data.iter().all(|&byte| byte == 1));
                });
            }
        });
        let copies: Vec<_> = gpus.iter().map(|gpu| [&gpu.uploads, &gpu.downloads].map(|count| count.load(Ordering::SeqCst))).collect();
        assert_eq!(copies, [[0, 1], [1, 0], [0, 1]]);
        assert!(gpus.iter().all(|gpu| gpu.buffer.lock().unwrap().len() == kept));
    }
}

/// One member on each GPU of this machine: NCCL refuses two on the same one in a process.
fn world_on_gpus(num_members: u32) -> Vec<Box<dyn Collective>> {
    let connecting: Vec<_> = members(num_members)
        .into_iter()
        .enumerate()
        .map(|(ordinal, control)| thread::spawn(move || super::connect(control, NcclDevice::open(ordinal)?, soon())))
        .collect();
    connecting.into_iter().map(|member| member.join().unwrap().unwrap()).collect()
}

/// As many members as there are GPUs, up to three; none, said in one line, without a GPU or NCCL, unless PEAPOD_NCCL wants them.
fn sizes_on_gpus() -> Vec<u32> {
    match Driver::probe().and_then(|driver| nccl_version_text().map(|_| driver)) {
        Ok(driver) => (1..=driver.num_devices.min(3) as u32).collect(),
        Err(error) => {
            assert!(std::env::var_os("PEAPOD_NCCL").is_none(), "{error}");
            eprintln!("skipped: {error}");
            Vec::new()
        }
    }
}

mod suite_on_gpus {
    crate::conformance_suite!(super::world_on_gpus, super::sizes_on_gpus());
}

/// All members sum one value each; the results, in order.
fn sum(world: &mut [Engine<FakeGpu>], deadline: Instant) -> Vec<Result<f32, Error>> {
    thread::scope(|scope| {
        let summing: Vec<_> = world
            .iter_mut()
            .map(|member| {
                scope.spawn(move || {
                    let mut data = [1.0];
                    member.all_reduce_sum(&mut data, deadline).map(|()| data[0])
                })
            })
            .collect();
        summing.into_iter().map(|member| member.join().unwrap()).collect()
    })
}

fn whole(gpus: &[Arc<FakeGpu>]) -> Vec<Engine<FakeGpu>> {
    connect(gpus, soon()).into_iter().map(Result::unwrap).collect()
}

#[test]
fn building_and_launching_wait_until_nccl_is_no_longer_busy() {
    let gpus = gpus(2);
    gpus[0].busy.store(7, Ordering::SeqCst);
    let mut world = whole(&gpus);
    assert_eq!(gpus[0].busy.load(Ordering::SeqCst), 0);
    gpus[1].busy.store(9, Ordering::SeqCst);
    // `mark` fails the test if it comes while NCCL is busy.
    assert!(sum(&mut world, soon()).into_iter().all(|sum| sum.unwrap() == 2.0));
    assert_eq!(gpus[1].marks.load(Ordering::SeqCst), 1);
}

#[test]
fn an_asynchronous_error_is_told_and_ends_both_members() {
    let gpus = gpus(2);
    let mut world = whole(&gpus);
    *gpus[1].fault.lock().unwrap() = Some("NCCL 2.28.9: unhandled system error");
    let results = sum(&mut world, soon());
    assert!(matches!(&results[1], Err(Error::Gpu { doing: "go on in NCCL", answer }) if answer.contains("unhandled")), "{results:?}");
    assert!(matches!(&results[0], Err(Error::PeerLost { member_index: 1, .. })), "{results:?}");
    for (member, gpu) in world.iter_mut().zip(&gpus) {
        assert_eq!(gpu.num_aborts.load(Ordering::SeqCst), 1);
        assert!(matches!(member.barrier(soon()), Err(Error::Poisoned { .. })));
    }
    drop(world);
    assert!(gpus.iter().all(|gpu| gpu.num_aborts.load(Ordering::SeqCst) == 1), "a communicator is aborted once");
}

#[test]
fn building_that_does_not_end_is_aborted_at_the_deadline() {
    let gpus = gpus(2);
    gpus.iter().for_each(|gpu| gpu.is_stuck.store(true, Ordering::SeqCst));
    let results = connect(&gpus, Instant::now() + SHORT * 10);
    let is_timeout = |result: &Result<_, Error>| matches!(result, Err(Error::Timeout { during: Operation::Rendezvous, .. }));
    assert!(results.iter().any(is_timeout));
    // Who was later may have seen the other leave.
    assert!(results.iter().all(|result| is_timeout(result) || matches!(result, Err(Error::PeerLost { .. }))));
    assert!(gpus.iter().all(|gpu| gpu.num_aborts.load(Ordering::SeqCst) == 1));
}

#[test]
fn a_member_whose_gpu_does_not_come_to_a_sum_says_so() {
    for (computes_for_ever, on_host) in [(true, false), (false, false), (true, true)] {
        let gpus = gpus(2);
        let mut world = whole(&gpus);
        gpus.iter().for_each(|gpu| gpu.is_stuck.store(true, Ordering::SeqCst));
        gpus[1].computes_for_ever.store(computes_for_ever, Ordering::SeqCst);
        // Its own deadline comes first, so that it sees no other leave.
        let deadlines = [soon(), Instant::now() + SHORT * 10];
        let errors: Vec<Error> = thread::scope(|scope| {
            let summing: Vec<_> = world
                .iter_mut()
                .zip(deadlines)
                .map(|(member, deadline)| {
                    scope.spawn(move || {
                        let mut values = [1.0_f32; 4];
                        if on_host {
                            return member.all_reduce_sum(&mut values, deadline).unwrap_err();
                        }
                        // SAFETY: the values outlive the call, in which nobody else looks at them.
                        let place = unsafe { DeviceValues::new(values.as_ptr() as u64, values.len(), STREAM) };
                        member.all_reduce_sum_in(Values::Device(place), deadline).unwrap_err()
                    })
                })
                .collect();
            summing.into_iter().map(|member| member.join().unwrap()).collect()
        });
        match &errors[1] {
            Error::Stuck { during: Operation::AllReduceSum } => assert!(computes_for_ever && !on_host),
            Error::Timeout { .. } => assert!(!computes_for_ever || on_host, "what is copied from here has been computed"),
            other => panic!("{other:?}"),
        }
        assert!(matches!(errors[0], Error::PeerLost { member_index: 1, .. }), "{errors:?}");
    }
}

#[test]
fn nothing_is_taken_from_the_gpu_when_an_abort_breaks_into_a_sum() {
    let gpus = gpus(2);
    let mut world = whole(&gpus);
    gpus.iter().for_each(|gpu| gpu.is_stuck.store(true, Ordering::SeqCst));
    let handle = world[0].abort_handle();
    let results = thread::scope(|scope| {
        scope.spawn(|| {
            while gpus[0].launched.load(Ordering::SeqCst) == 0 {
                thread::yield_now();
            }
            handle.abort("generation 8 begins");
        });
        sum(&mut world, soon())
    });
    assert!(matches!(&results[0], Err(Error::Aborted { reason }) if reason == "generation 8 begins"), "{results:?}");
    assert!(matches!(&results[1], Err(Error::PeerLost { member_index: 0, .. })), "{results:?}");
    assert!(gpus.iter().all(|gpu| gpu.downloads.load(Ordering::SeqCst) == 0 && gpu.marks.load(Ordering::SeqCst) == 0));
}

#[test]
fn an_abort_that_hangs_is_told_instead_of_waited_for() {
    let gpus = gpus(1);
    let mut world = whole(&gpus);
    gpus[0].is_stuck.store(true, Ordering::SeqCst);
    gpus[0].abort_hangs.store(true, Ordering::SeqCst);
    let results = sum(&mut world, Instant::now() + SHORT);
    assert!(matches!(&results[0], Err(Error::AbortHung { after }) if *after == SHORT), "{results:?}");
    // What comes next, and leaving, does not wait again.
    let before = Instant::now();
    assert!(matches!(world[0].barrier(soon()), Err(Error::Poisoned { .. })));
    drop(world);
    assert!(before.elapsed() < SHORT);
}
