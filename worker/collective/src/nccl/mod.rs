//! NCCL, for workers on GPUs.
//!
//! A ring of TCP connections ([`TcpCollective`]) stays beside the NCCL communicator for what NCCL does not do: it proves that members
//! belong to the generation, carries NCCL's unique id, compares what each member is about to do, and tells at once that a neighbour is
//! gone. Before an operation every member has entered it with the same length; after it nobody leaves while another is still inside.
//!
//! NCCL is never waited for in a call that blocks. What it was asked to do is polled, beside the links, the abort flag and the deadline;
//! the caller gets its data only when the sum is known to be whole. A communicator that failed is aborted on a thread of its own, since
//! that may hang: a process in which it does cannot go on ([`Error::AbortHung`]).

mod gpu;
mod library;
#[cfg(test)]
mod tests;

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use gpu::{Comm, Fault, Gpu, Progress, UNIQUE_ID_BYTES};
pub use library::{Driver, NcclDevice, device_name, memory, nccl_version_text, uuid};

use crate::solo::check_root;
use crate::tcp::TcpCollective;
use crate::{AbortHandle, Collective, Error, Operation, Stall, Values};

/// Between two looks at what NCCL does. An all-reduce of an adapter takes about a millisecond.
const LOOK_EVERY: Duration = Duration::from_micros(50);
/// An abort that takes longer than this is taken for one that never ends. One in the middle of NCCL's look at the host's topology waits for
/// the end of that, which can take many seconds; one that is given up costs the process, with the weights it holds.
const ABORT_PATIENCE: Duration = Duration::from_secs(30);

/// What a broadcast leaves of the GPU's buffer. The weights that a generation begins with are not sent again in it, and the networks want
/// the memory.
const KEPT_BYTES: usize = 16 << 20;

/// Forms the communicator of a generation on `device`; `control` is its members' ring. Returns when NCCL is ready on this member.
///
/// Errors: [`Error::Gpu`] with NCCL's answer; [`Error::PeerLost`] if a neighbour dies meanwhile; [`Error::Timeout`]; [`Error::Aborted`].
pub fn connect(control: TcpCollective, device: Arc<NcclDevice>, deadline: Instant) -> Result<Box<dyn Collective>, Error> {
    Ok(Box::new(Engine::connect(control, device, ABORT_PATIENCE, deadline)?))
}

/// One member's end of a communicator, whatever it runs on.
struct Engine<G: Gpu> {
    gpu: Arc<G>,
    member_index: u32,
    num_members: u32,
    abort: AbortHandle,
    abort_patience: Duration,
    /// `None` once the communicator has failed: dropping it told the neighbours.
    control: Option<TcpCollective>,
    comm: Option<Comm>,
    stalled: Option<Stall>,
    failure: Option<String>,
}

impl<G: Gpu> Engine<G> {
    fn connect(mut control: TcpCollective, gpu: Arc<G>, abort_patience: Duration, deadline: Instant) -> Result<Self, Error> {
        let (member_index, num_members) = (control.member_index(), control.num_members());
        let mut id = [0; UNIQUE_ID_BYTES];
        if member_index == 0 {
            id = gpu.unique_id().map_err(Error::from)?;
        }
        control.broadcast(&mut id, 0, deadline)?;
        let mut engine = Self {
            comm: Some(gpu.start(&id, num_members, member_index).map_err(Error::from)?),
            gpu,
            member_index,
            num_members,
            abort: control.abort_handle(),
            abort_patience,
            control: Some(control),
            stalled: None,
            failure: None,
        };
        let ready = engine.until_idle(Operation::Rendezvous, deadline).and_then(|()| engine.meet(Operation::Rendezvous, 0, deadline));
        match ready {
            Ok(()) => Ok(engine),
            Err(error) => Err(engine.fail(error)),
        }
    }

    /// Runs one operation, unless the communicator has ended; an error ends it. What the GPU is asked for is `launch`: in its buffer, for
    /// `data` of this process, or in place.
    fn run(
        &mut self,
        operation: Operation,
        data: Data<'_>,
        deadline: Instant,
        launch: impl FnOnce(&G, Comm) -> Result<(), Fault>,
    ) -> Result<(), Error> {
        self.abort.check()?;
        if let Some(first) = &self.failure {
            return Err(Error::Poisoned { first: first.clone() });
        }
        self.run_once(operation, data, deadline, launch).map_err(|error| self.fail(error))
    }

    fn run_once(
        &mut self,
        operation: Operation,
        mut data: Data<'_>,
        deadline: Instant,
        launch: impl FnOnce(&G, Comm) -> Result<(), Fault>,
    ) -> Result<(), Error> {
        // 1. Everybody is here, and means the same.
        let num_bytes = match &data {
            Data::Copied(bytes) | Data::Sent(bytes) | Data::Received(bytes) => bytes.len(),
            Data::InPlace { num_bytes } => *num_bytes,
        };
        self.meet(operation, num_bytes, deadline)?;
        if num_bytes == 0 {
            return Ok(());
        }
        let Some(comm) = self.comm else { return Err(no_communicator()) };

        // 2. NCCL may answer before its kernel is on the stream: a mark set then would be passed too early.
        match &data {
            Data::Copied(bytes) | Data::Sent(bytes) => self.gpu.upload(bytes)?,
            Data::Received(bytes) => self.gpu.reserve(bytes.len())?,
            Data::InPlace { .. } => {}
        }
        launch(&self.gpu, comm)?;
        let launched = self.until_idle(operation, deadline).and_then(|()| {
            self.gpu.mark()?;
            self.until(operation, deadline, |gpu| Ok(gpu.progress(comm)? == Progress::Idle && gpu.is_past_mark()?))
        });
        match launched {
            // NCCL does not say whom it waits for. This member can say whether it is itself.
            Err(Error::Timeout { .. }) if matches!(data, Data::InPlace { .. }) && !self.gpu.has_come_to_sum()? => {
                return Err(Error::Stuck { during: operation });
            }
            launched => launched?,
        }
        if let Data::Copied(bytes) | Data::Received(bytes) = &mut data {
            self.gpu.download(bytes)?;
        }
        if matches!(data, Data::Sent(_) | Data::Received(_)) {
            self.gpu.trim(KEPT_BYTES)?;
        }

        // 3. Nobody leaves, which closes links and frees buffers, while another is still inside.
        self.meet(operation, num_bytes, deadline)
    }

    /// Returns once every member has come here with the same operation and length.
    fn meet(&mut self, operation: Operation, num_bytes: usize, deadline: Instant) -> Result<(), Error> {
        let Some(control) = &mut self.control else { return Err(no_communicator()) };
        let met = control.meet(operation, num_bytes, deadline);
        self.stalled = control.stalled();
        met
    }

    /// Polls until NCCL has nothing under way.
    fn until_idle(&self, operation: Operation, deadline: Instant) -> Result<(), Error> {
        let Some(comm) = self.comm else { return Err(no_communicator()) };
        self.until(operation, deadline, |gpu| Ok(gpu.progress(comm)? == Progress::Idle))
    }

    /// Polls until `is_done`, an error, the loss of a neighbour, an abort or the deadline.
    fn until(&self, operation: Operation, deadline: Instant, is_done: impl Fn(&G) -> Result<bool, Fault>) -> Result<(), Error> {
        loop {
            if is_done(&self.gpu)? {
                return Ok(());
            }
            self.abort.check()?;
            if let Some(control) = &self.control {
                control.check_links(operation)?;
            }
            if Instant::now() >= deadline {
                return Err(Error::Timeout { during: operation, waiting_for: Vec::new() });
            }
            thread::sleep(LOOK_EVERY);
        }
    }

    /// Ends the communicator. The neighbours hear of it before NCCL does, whose abort may take long.
    fn fail(&mut self, error: Error) -> Error {
        self.failure = Some(error.to_string());
        self.control = None;
        let error = self.abort.check().err().unwrap_or(error);
        match self.end() {
            Ok(()) => error,
            Err(hung) => {
                tracing::error!(%error, "the communicator failed, and then its abort");
                hung
            }
        }
    }

    /// Aborts NCCL's communicator, if it is still there.
    fn end(&mut self) -> Result<(), Error> {
        let Some(comm) = self.comm.take() else { return Ok(()) };
        let (done, end) = mpsc::channel();
        let gpu = Arc::clone(&self.gpu);
        let aborting = move || {
            // The receiver is gone when this took too long.
            _ = done.send(gpu.abort(comm));
        };
        let thread = thread::Builder::new().name("nccl abort".into()).spawn(aborting);
        thread.map_err(|source| Error::Io { doing: "start a thread", source })?;
        match end.recv_timeout(self.abort_patience) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(fault)) => {
                tracing::warn!(fault = %Error::from(fault), "NCCL did not abort cleanly");
                Ok(())
            }
            Err(_) => Err(Error::AbortHung { after: self.abort_patience }),
        }
    }
}

impl<G: Gpu> Drop for Engine<G> {
    fn drop(&mut self) {
        self.control = None;
        if let Err(error) = self.end() {
            tracing::error!(%error, "a communicator was left behind");
        }
    }
}

/// What an operation works on.
enum Data<'a> {
    /// Bytes of this process, copied to the GPU and back.
    Copied(&'a mut [u8]),
    /// Bytes of this process that the others get.
    Sent(&'a mut [u8]),
    /// Where bytes of another go.
    Received(&'a mut [u8]),
    /// What lies on the GPU.
    InPlace { num_bytes: usize },
}

fn no_communicator() -> Error {
    Error::Poisoned { first: "it has ended".into() }
}

impl<G: Gpu> Collective for Engine<G> {
    fn member_index(&self) -> u32 {
        self.member_index
    }

    fn num_members(&self) -> u32 {
        self.num_members
    }

    fn all_reduce_sum_in(&mut self, values: Values<'_>, deadline: Instant) -> Result<(), Error> {
        let (operation, num_bytes) = (Operation::AllReduceSum, values.num_bytes());
        match values {
            Values::Host(values) => {
                let num_values = values.len();
                let bytes = Data::Copied(bytemuck::cast_slice_mut(values));
                self.run(operation, bytes, deadline, |gpu, comm| gpu.all_reduce(comm, num_values))
            }
            Values::Device(values) => {
                self.run(operation, Data::InPlace { num_bytes }, deadline, |gpu, comm| gpu.all_reduce_in_place(comm, values))
            }
        }
    }

    fn sums_on_device(&self) -> bool {
        true
    }

    fn broadcast(&mut self, data: &mut [u8], root: u32, deadline: Instant) -> Result<(), Error> {
        let (num_bytes, num_members) = (data.len(), self.num_members);
        self.abort.check()?;
        if self.failure.is_none() {
            check_root(root, num_members).map_err(|error| self.fail(error))?;
        }
        let data = if root == self.member_index { Data::Sent(data) } else { Data::Received(data) };
        self.run(Operation::Broadcast { root }, data, deadline, |gpu, comm| gpu.broadcast(comm, num_bytes, root))
    }

    fn barrier(&mut self, deadline: Instant) -> Result<(), Error> {
        self.run(Operation::Barrier, Data::Copied(&mut []), deadline, |_, _| Ok(()))
    }

    fn stalled(&self) -> Option<Stall> {
        self.stalled
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }
}
