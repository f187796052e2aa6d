//! Failures on purpose at an exact point: how the tests make a real process fail in the same way each time.
//!
//! `PEAPOD_FAULTS` lists them as `POINT@STEP`, separated by commas, such as `die-before-all-reduce@5,cut-stream@9`. It is read once, when
//! the worker starts, and a worker that was given any says so in its log before all else. Each strikes once: the first time that its point
//! is reached at its step or a later one. Without the variable nothing of this is in a worker's way; whoever can set it could as well kill
//! the process.

mod collective;

use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use peapod_collective::{AbortHandle, Collective};
use peapod_proto::ids::Step;
use peapod_proto::message::{FromWorker, ToWorker};

use self::collective::Faulty;

/// The variable that lists the faults of a worker.
pub const VARIABLE: &str = "PEAPOD_FAULTS";
/// Between two looks at whether a stall was broken off.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Where a worker can be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// Dies (SIGKILL) as it enters the all-reduce of the step.
    DieBeforeAllReduce,
    /// Dies when it has the sum of the step, before it applies it.
    DieAfterAllReduce,
    /// Fails instead of entering the all-reduce of the step, and lives: it finishes nowhere.
    RefuseAllReduce,
    /// Takes part in the all-reduce of the step, which finishes on the others, and then takes it for failed.
    LoseAllReduce,
    /// Passes on the state that a generation starts from in two halves, as all its members must then. The step does not matter.
    HalveBroadcasts,
    /// Dies between the halves of a state of this step or a later one.
    DieInBroadcast,
    /// Fails between them, and lives.
    FailInBroadcast,
    /// Waits for the samples of the step in vain, until it is told to abort.
    StallInData,
    /// Hangs for good before it takes the samples of the step, out of reach of an abort.
    HangInData,
    /// Hangs for good in the gradient of the step, out of reach of an abort.
    HangInCompute,
    /// Has too little memory for the gradient of the step, in one piece.
    RunOutOfMemory,
    /// Does not hear the next abort that it is told, once it holds the step.
    MissAbort,
    /// Loses its stream to the coordinator, once it holds the step.
    CutStream,
    /// Sends no heartbeat any more on its stream, once it holds the step.
    FallSilent,
}

const NAMES: [(Point, &str); 14] = [
    (Point::DieBeforeAllReduce, "die-before-all-reduce"),
    (Point::DieAfterAllReduce, "die-after-all-reduce"),
    (Point::RefuseAllReduce, "refuse-all-reduce"),
    (Point::LoseAllReduce, "lose-all-reduce"),
    (Point::HalveBroadcasts, "halve-broadcasts"),
    (Point::DieInBroadcast, "die-in-broadcast"),
    (Point::FailInBroadcast, "fail-in-broadcast"),
    (Point::StallInData, "stall-in-data"),
    (Point::HangInData, "hang-in-data"),
    (Point::HangInCompute, "hang-in-compute"),
    (Point::RunOutOfMemory, "run-out-of-memory"),
    (Point::MissAbort, "miss-abort"),
    (Point::CutStream, "cut-stream"),
    (Point::FallSilent, "fall-silent"),
];

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(NAMES.iter().find(|(point, _)| point == self).map_or("", |(_, name)| name))
    }
}

/// What is left to strike a worker.
#[derive(Debug, Default)]
pub struct Faults {
    left: Mutex<Vec<(Point, Step)>>,
}

impl FromStr for Faults {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fault = |word: &str| {
            let (name, step) = word.split_once('@').ok_or_else(|| format!("{VARIABLE}: {word:?} is not POINT@STEP"))?;
            let Some(&(point, _)) = NAMES.iter().find(|(_, known)| *known == name) else {
                let known: Vec<&str> = NAMES.iter().map(|(_, name)| *name).collect();
                return Err(format!("{VARIABLE}: there is no point {name:?}; there are {}", known.join(", ")));
            };
            let step = step.parse().map_err(|_| format!("{VARIABLE}: {step:?} in {word:?} is no step"))?;
            Ok((point, Step(step)))
        };
        let left = text.split(',').map(str::trim).filter(|word| !word.is_empty()).map(fault).collect::<Result<_, _>>()?;
        Ok(Self { left: Mutex::new(left) })
    }
}

impl Faults {
    /// Those of [`VARIABLE`], which it announces; none without it.
    ///
    /// # Errors
    /// One line that says what in it makes no sense.
    pub fn of_environment() -> Result<Self, String> {
        let text = std::env::var(VARIABLE).unwrap_or_default();
        let faults: Self = text.parse()?;
        if !faults.is_empty() {
            tracing::warn!("{VARIABLE} is set: this worker is going to fail on purpose ({text})");
        }
        Ok(faults)
    }

    fn left(&self) -> std::sync::MutexGuard<'_, Vec<(Point, Step)>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_empty(&self) -> bool {
        self.left().is_empty()
    }

    /// Whether a worker that is at `point` of `step` fails there now.
    fn strikes(&self, point: Point, step: Step) -> bool {
        let mut left = self.left();
        let Some(at) = left.iter().position(|&(planned, from)| planned == point && step >= from) else { return false };
        left.swap_remove(at);
        drop(left);
        tracing::warn!("{VARIABLE}: {point} at step {step}");
        true
    }

    fn halves_broadcasts(&self) -> bool {
        self.left().iter().any(|(point, _)| *point == Point::HalveBroadcasts)
    }

    /// `collective` as the faults that are left have it, for a generation that starts from the weights of step `base`.
    pub fn over(self: &std::sync::Arc<Self>, collective: Box<dyn Collective>, base: Step) -> Box<dyn Collective> {
        if self.is_empty() { collective } else { Box::new(Faulty::new(collective, self.clone(), base)) }
    }

    /// To be called before the samples of `step` are waited for.
    pub fn in_data(&self, step: Step, abort: &AbortHandle) {
        if self.strikes(Point::HangInData, step) {
            hang();
        }
        if self.strikes(Point::StallInData, step) {
            while abort.reason().is_none() {
                std::thread::sleep(LOOK_EVERY);
            }
        }
    }

    /// To be called before the gradient of `step` is computed.
    pub fn in_compute(&self, step: Step) {
        if self.strikes(Point::HangInCompute, step) {
            hang();
        }
    }

    /// To be called on the way through the models in `step`.
    ///
    /// # Panics
    /// As libtorch's operators do.
    #[expect(clippy::panic, reason = "what libtorch's errors are turned into")]
    pub fn in_pass(&self, step: Step) {
        if self.strikes(Point::RunOutOfMemory, step) {
            panic!("CUDA out of memory. Tried to allocate 2.00 GiB.");
        }
    }

    /// Whether what the coordinator says is lost on its way to a worker that holds `step`.
    pub fn lose(&self, message: &ToWorker, step: Step) -> bool {
        matches!(message, ToWorker::Abort { .. }) && self.strikes(Point::MissAbort, step)
    }

    /// Whether the stream of a worker that holds `step` breaks now.
    pub fn cut_stream(&self, step: Step) -> bool {
        self.strikes(Point::CutStream, step)
    }

    /// Whether what a worker that holds `step` sends never leaves it; `silent` lasts as long as its stream.
    pub fn keep_back(&self, message: &FromWorker, step: Step, silent: &mut bool) -> bool {
        *silent = *silent || self.strikes(Point::FallSilent, step);
        *silent && matches!(message, FromWorker::Heartbeat(_))
    }
}

/// Never returns, whatever happens in the process.
fn hang() -> ! {
    loop {
        std::thread::park();
    }
}

/// Ends the process as the kernel does: nothing is flushed, said or closed by hand.
fn die() -> ! {
    // The signal cannot fail to be sent to oneself; if it did, hanging would be noticed too.
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    hang()
}

#[cfg(test)]
mod tests {
    use peapod_proto::ids::Generation;
    use peapod_proto::message::{Heartbeat, Memory, Phase};

    use super::*;

    #[test]
    fn every_point_is_read_as_it_is_written() {
        for (point, _) in NAMES {
            let faults: Faults = format!("{point}@3").parse().unwrap();
            assert!(!faults.strikes(point, Step(2)) && faults.strikes(point, Step(3)), "{point}");
        }
    }

    #[test]
    fn fault_strikes_once_at_its_step_or_the_first_one_after() {
        let faults: Faults = "lose-all-reduce@5, lose-all-reduce@5,cut-stream@9,".parse().unwrap();
        let lost = [4, 7, 8, 9].map(|step| faults.strikes(Point::LoseAllReduce, Step(step)));
        assert_eq!(lost, [false, true, true, false], "two are planned");
        assert!(!faults.is_empty() && faults.cut_stream(Step(9)) && faults.is_empty());
    }

    #[test]
    fn plan_that_makes_no_sense_is_refused() {
        let refusal = |text: &str| text.parse::<Faults>().unwrap_err();
        assert!(refusal("die").ends_with("\"die\" is not POINT@STEP"));
        assert!(refusal("explode@1").contains("there is no point \"explode\"; there are die-before-all-reduce, "));
        assert!(refusal("cut-stream@soon").ends_with("\"soon\" in \"cut-stream@soon\" is no step"));
        assert!("".parse::<Faults>().unwrap().is_empty());
    }

    #[test]
    fn only_what_is_named_is_lost() {
        let faults: Faults = "miss-abort@2,fall-silent@2".parse().unwrap();
        let abort = ToWorker::Abort { generation: Generation(1), reason: String::new() };
        let change = ToWorker::PlanChange { generation: Generation(1), reason: String::new() };
        assert!(!faults.lose(&abort, Step(1)) && !faults.lose(&change, Step(2)));
        assert!(faults.lose(&abort, Step(2)) && !faults.lose(&abort, Step(2)));
        let heartbeat = FromWorker::Heartbeat(Heartbeat {
            step: Step(2),
            phase: Phase::Data,
            generation: Generation(1),
            reads: 0,
            memory: Memory::default(),
        });
        let leaving = FromWorker::Leaving { reason: String::new() };
        let mut silent = false;
        assert!(!faults.keep_back(&heartbeat, Step(1), &mut silent));
        assert!(faults.keep_back(&heartbeat, Step(2), &mut silent) && !faults.keep_back(&leaving, Step(2), &mut silent));
        assert!(faults.keep_back(&heartbeat, Step(3), &mut silent), "until the stream ends");
        assert!(!faults.keep_back(&heartbeat, Step(3), &mut false));
    }
}
