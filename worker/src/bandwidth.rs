//! How fast the devices of this host sum a gradient: one member for each of them, in threads of this process, over the same collective and
//! from the same memory as a job's workers.

use std::net::{IpAddr, Ipv4Addr};
use std::thread;
use std::time::{Duration, Instant};

use peapod_collective::nccl::{self, Driver, NcclDevice};
use peapod_collective::tcp::{Bootstrap, Listener, Membership, Ports, TcpCollective};
use peapod_collective::{AbortHandle, Collective, Error};
use tch::{Device, TchError};

use crate::trainer::wire::Wire;

/// How long the sums are repeated, about.
const MEASURED_FOR: Duration = Duration::from_secs(1);
/// Sums before the clock starts: NCCL builds its channels in the first.
const WARM_UP: u32 = 3;
/// Least and most sums that are timed.
const ROUNDS: (f64, f64) = (5.0, 1000.0);
/// None of the steps takes so long unless it hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// What was measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bandwidth {
    /// Members that summed.
    pub num_members: u32,
    /// Bytes of the sum.
    pub num_bytes: u64,
    /// Time of a sum.
    pub time: Duration,
}

impl Bandwidth {
    /// Bytes summed a second.
    #[must_use]
    pub fn algorithm(&self) -> f64 {
        self.num_bytes as f64 / self.time.as_secs_f64()
    }

    /// Bytes a second through each member's link: a ring sends every byte `2 (n - 1) / n` times.
    #[must_use]
    pub fn bus(&self) -> f64 {
        let num_members = f64::from(self.num_members);
        self.algorithm() * 2.0 * (num_members - 1.0) / num_members
    }
}

/// The devices that can sum among each other: all GPUs that this host shows, or `num_threads` times the CPU.
///
/// # Errors
/// One line: the driver does not answer, or there is one GPU alone.
pub fn members(device: Device, num_threads: u32) -> Result<Vec<Device>, String> {
    let Device::Cuda(_) = device else { return Ok(vec![device; num_threads as usize]) };
    let num_devices = Driver::probe().map_err(|error| error.to_string())?.num_devices;
    if num_devices < 2 {
        return Err("--bandwidth: this host shows one GPU, which has nobody to sum with; --device cpu sums over TCP".into());
    }
    Ok((0..num_devices).map(Device::Cuda).collect())
}

/// Sums `num_values` f32 over `devices`, again and again.
///
/// # Errors
/// What the first member that failed says.
pub fn measure(devices: &[Device], num_values: usize) -> Result<Bandwidth, Error> {
    let local = IpAddr::from(Ipv4Addr::LOCALHOST);
    let at_zero = Listener::open(local, local, Ports::ANY)?;
    let bootstrap = at_zero.bootstrap()?;
    let num_members = devices.len() as u32;
    let abort = AbortHandle::new();
    let mut at_zero = Some(at_zero);
    let times = thread::scope(|scope| {
        let start = |(member_index, &device): (u32, &Device)| {
            let (bootstrap, abort, listener) = (&bootstrap, abort.clone(), at_zero.take());
            let membership = Membership { generation: 1, member_index, num_members };
            scope.spawn(move || {
                let listener = listener.map_or_else(|| Listener::open(local, local, Ports::ANY), Ok);
                let collective = listener.and_then(|listener| connect(device, bootstrap, membership, listener, abort.clone()));
                let time = collective.and_then(|mut collective| repeat(collective.as_mut(), device, num_values));
                // The others need not wait for one that failed until their deadlines.
                time.inspect_err(|error| abort.abort(format!("member {member_index}: {error}")))
            })
        };
        let threads: Vec<_> = (0..).zip(devices).map(start).collect();
        let panicked = || Error::InvalidArgument { reason: "a member's thread panicked".into() };
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(panicked()))).collect::<Vec<_>>()
    });
    let (mut slowest, mut failure) = (Duration::ZERO, None);
    for time in times {
        match time {
            Ok(time) => slowest = slowest.max(time),
            // Most only see that another is gone.
            Err(Error::Aborted { .. } | Error::PeerLost { .. }) if failure.is_some() => {}
            Err(error) => failure = Some(error),
        }
    }
    match failure {
        Some(error) => Err(error),
        None => Ok(Bandwidth { num_members, num_bytes: (num_values * size_of::<f32>()) as u64, time: slowest }),
    }
}

fn connect(
    device: Device,
    bootstrap: &Bootstrap,
    membership: Membership,
    listener: Listener,
    abort: AbortHandle,
) -> Result<Box<dyn Collective>, Error> {
    let ring = TcpCollective::connect(bootstrap, membership, listener, abort, deadline())?;
    match device {
        Device::Cuda(ordinal) => nccl::connect(ring, NcclDevice::open(ordinal)?, deadline()),
        _ => Ok(Box::new(ring)),
    }
}

/// The time of a sum on this member.
fn repeat(collective: &mut dyn Collective, device: Device, num_values: usize) -> Result<Duration, Error> {
    let failed = |error: TchError| Error::Gpu { doing: "compute on the GPU", answer: error.to_string() };
    let mut wire = Wire::new(num_values, 0, device, collective.sums_on_device());
    let _ = wire.gradient().f_fill_(1.0).map_err(failed)?;
    wire.sum(collective, deadline())?;
    let wanted = f64::from(collective.num_members());
    if wire.gradient().f_ne(wanted).and_then(|wrong| wrong.f_any()).map_err(failed)?.int64_value(&[]) != 0 {
        let reason = format!("the sum of ones over {wanted} members has values that are not {wanted}");
        return Err(Error::InvalidArgument { reason });
    }
    // Sums of zeros stay zero, however many.
    wire.clear()?;
    time(collective, &mut wire, WARM_UP)?;
    let first = time(collective, &mut wire, WARM_UP)?;
    // All must sum equally often: as the first member says.
    let rounds = (MEASURED_FOR.as_secs_f64() / first.as_secs_f64().max(1e-9)).clamp(ROUNDS.0, ROUNDS.1) as u32;
    let mut agreed = rounds.to_le_bytes();
    collective.broadcast(&mut agreed, 0, deadline())?;
    time(collective, &mut wire, u32::from_le_bytes(agreed))
}

/// The mean time of so many sums, begun by all members together.
fn time(collective: &mut dyn Collective, wire: &mut Wire, rounds: u32) -> Result<Duration, Error> {
    collective.barrier(deadline())?;
    let clock = Instant::now();
    for _ in 0..rounds {
        wire.sum(collective, deadline())?;
    }
    Ok(clock.elapsed() / rounds)
}

fn deadline() -> Instant {
    Instant::now() + PATIENCE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_sum_over_tcp_and_are_timed() {
        for num_members in [2, 3] {
            let devices = members(Device::Cpu, num_members).unwrap();
            let bandwidth = measure(&devices, 100_000).unwrap();
            assert_eq!((bandwidth.num_members, bandwidth.num_bytes), (num_members, 400_000));
            assert!(bandwidth.time > Duration::from_micros(10) && bandwidth.time < Duration::from_secs(5), "{bandwidth:?}");
        }
    }

    /// The ring of four sends each quarter six times, of four of them: 1.5 times the bytes.
    #[test]
    fn the_bus_carries_more_than_the_algorithm() {
        let bandwidth = Bandwidth { num_members: 4, num_bytes: 1 << 30, time: Duration::from_millis(500) };
        assert!((bandwidth.algorithm() / 2_147_483_648.0 - 1.0).abs() < 1e-9);
        assert!((bandwidth.bus() / bandwidth.algorithm() - 1.5).abs() < 1e-9);
        let two = Bandwidth { num_members: 2, ..bandwidth };
        assert!((two.bus() / two.algorithm() - 1.0).abs() < 1e-9);
    }
}
