//! A communicator whose calls fail as planned.

use std::sync::Arc;
use std::time::{Duration, Instant};

use peapod_collective::{AbortHandle, Collective, Error, Stall, Values};
use peapod_proto::ids::Step;

use super::{Faults, Point, VARIABLE, die};

/// Until the other members have what this one has sent them, which may be lost with the connection. They then wait for it in the next
/// all-reduce.
const OTHERS_FINISH: Duration = Duration::from_millis(300);

/// Counts the steps from the base of its generation: each all-reduce is one.
pub(super) struct Faulty {
    inner: Box<dyn Collective>,
    faults: Arc<Faults>,
    /// Of the state that is broadcast, and then of the last all-reduce that was entered.
    step: Step,
}

impl Faulty {
    pub(super) fn new(inner: Box<dyn Collective>, faults: Arc<Faults>, base: Step) -> Self {
        Self { inner, faults, step: base }
    }

    /// The error of a call that was made to fail. The communicator is of no use after it, as after any error.
    fn failed(&self, point: Point) -> Result<(), Error> {
        let reason = format!("{VARIABLE}: {point}");
        self.inner.abort_handle().abort(reason.clone());
        Err(Error::Aborted { reason })
    }
}

impl Collective for Faulty {
    fn member_index(&self) -> u32 {
        self.inner.member_index()
    }

    fn num_members(&self) -> u32 {
        self.inner.num_members()
    }

    fn all_reduce_sum_in(&mut self, values: Values<'_>, deadline: Instant) -> Result<(), Error> {
        self.step = self.step.next();
        if self.faults.strikes(Point::DieBeforeAllReduce, self.step) {
            die();
        }
        if self.faults.strikes(Point::RefuseAllReduce, self.step) {
            return self.failed(Point::RefuseAllReduce);
        }
        self.inner.all_reduce_sum_in(values, deadline)?;
        if self.faults.strikes(Point::DieAfterAllReduce, self.step) {
            std::thread::sleep(OTHERS_FINISH);
            die();
        }
        if self.faults.strikes(Point::LoseAllReduce, self.step) {
            std::thread::sleep(OTHERS_FINISH);
            return self.failed(Point::LoseAllReduce);
        }
        Ok(())
    }

    fn sums_on_device(&self) -> bool {
        self.inner.sums_on_device()
    }

    fn broadcast(&mut self, data: &mut [u8], root: u32, deadline: Instant) -> Result<(), Error> {
        if !self.faults.halves_broadcasts() {
            return self.inner.broadcast(data, root, deadline);
        }
        let (first, second) = data.split_at_mut(data.len() / 2);
        self.inner.broadcast(first, root, deadline)?;
        // Whoever stands between the halves has seen all members enter the first.
        self.inner.barrier(deadline)?;
        if self.faults.strikes(Point::DieInBroadcast, self.step) {
            die();
        }
        if self.faults.strikes(Point::FailInBroadcast, self.step) {
            return self.failed(Point::FailInBroadcast);
        }
        self.inner.broadcast(second, root, deadline)
    }

    fn barrier(&mut self, deadline: Instant) -> Result<(), Error> {
        self.inner.barrier(deadline)
    }

    fn stalled(&self) -> Option<Stall> {
        self.inner.stalled()
    }

    fn abort_handle(&self) -> AbortHandle {
        self.inner.abort_handle()
    }
}

#[cfg(test)]
mod tests {
    use peapod_collective::SoloCollective;

    use super::*;

    fn faulty(plan: &str, base: u64) -> Box<dyn Collective> {
        let faults: Arc<Faults> = Arc::new(plan.parse().unwrap());
        faults.over(Box::new(SoloCollective::new(AbortHandle::new())), Step(base))
    }

    #[test]
    fn all_reduce_of_its_step_fails_and_with_it_the_communicator() {
        for (plan, point) in [("lose-all-reduce@6", "lose-all-reduce"), ("refuse-all-reduce@6", "refuse-all-reduce")] {
            let mut collective = faulty(plan, 4);
            assert!(collective.all_reduce_sum(&mut [1.0], Instant::now()).is_ok(), "step 5");
            let error = collective.all_reduce_sum(&mut [1.0], Instant::now()).unwrap_err();
            assert_eq!(error.to_string(), format!("collective aborted: PEAPOD_FAULTS: {point}"));
            assert!(collective.barrier(Instant::now()).is_err());
            assert!(collective.abort_handle().reason().is_some());
        }
    }

    #[test]
    fn halves_of_a_broadcast_come_to_the_whole() {
        let mut bytes = [1, 2, 3];
        faulty("halve-broadcasts@0", 4).broadcast(&mut bytes, 0, Instant::now()).unwrap();
        assert_eq!(bytes, [1, 2, 3]);
        let mut cut = faulty("halve-broadcasts@0,fail-in-broadcast@4", 4);
        assert!(cut.broadcast(&mut bytes, 0, Instant::now()).is_err());
    }
}
