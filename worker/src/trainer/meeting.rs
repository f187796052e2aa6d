//! How a member comes to a generation: the communicator, and the weights of the step it starts from.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use peapod_collective::nccl::{self, NcclDevice};
use peapod_collective::tcp::{Bootstrap, Listener, Membership, TcpCollective};
use peapod_collective::{AbortHandle, Collective, Footing, SoloCollective, agree};
use peapod_proto::ids::{Generation, Step};
use peapod_proto::message::Assignment;
use tch::Device;

use super::ended::{Ended, with_sources};
use super::state::TrainState;
use super::training::COLLECTIVE_TIMEOUT;
use super::{NotFetched, Trainer};
use crate::setup;

/// The members of a generation are told of it within moments of each other: one that cannot be reached for so long is cut off.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);

impl Trainer {
    fn open_listener(&self) -> Result<Listener, String> {
        // Other hosts may reach the advertised address through a translation: only the loopback is bound as it is.
        let any = match self.context.advertise {
            loopback if loopback.is_loopback() => loopback,
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        Listener::open(any, self.context.advertise, self.context.ports).map_err(|error| with_sources(&error))
    }

    pub(super) fn bootstrap(&mut self, generation: Generation) -> Result<Vec<u8>, String> {
        // One of a generation that never began has its port still, which may be the only one.
        self.listener = None;
        let listener = self.open_listener()?;
        let bootstrap = listener.bootstrap().map_err(|error| with_sources(&error))?;
        self.listener = Some((generation, listener));
        Ok(bootstrap.to_bytes())
    }

    /// Puts the data threads where the new generation starts. That leases are lost was told them with the assignment.
    pub(super) fn settle_data(&mut self, assignment: &Assignment) {
        // In this order: what comes back last is given out first.
        if let Some(ahead) = self.ahead.take() {
            self.loader.put_back(ahead.share);
        }
        match self.in_flight.take() {
            Some((step, share)) if is_void(step, assignment.base_step) => self.loader.put_back(share),
            _ => {}
        }
        self.loader.handle().ask_again();
    }

    /// Builds the communicator and comes to hold the base step.
    pub(super) fn enter(&mut self, assignment: &Assignment, abort: &AbortHandle) -> Result<Box<dyn Collective>, Ended> {
        let deadline = Instant::now() + COLLECTIVE_TIMEOUT;
        let broken = Ended::by;
        let mut collective: Box<dyn Collective> = if assignment.num_members == 1 {
            Box::new(SoloCollective::new(abort.clone()))
        } else {
            let listener = match self.listener.take().filter(|(generation, _)| *generation == assignment.generation) {
                Some((_, listener)) => listener,
                None => self.open_listener().map_err(Ended::broken)?,
            };
            let membership = Membership {
                generation: assignment.generation.0,
                member_index: assignment.member_index.0,
                num_members: assignment.num_members,
            };
            let bootstrap = Bootstrap::from_bytes(&assignment.bootstrap).map_err(broken)?;
            let connected = Instant::now() + CONNECT_TIMEOUT;
            let mut ring = TcpCollective::connect(&bootstrap, membership, listener, abort.clone(), connected).map_err(broken)?;
            // What is missing here is missing in the next generation too.
            let gpu = self.open_gpu().map_err(|error| Ended::Failed { phase: "connecting", message: error.to_string() })?;
            let footing = gpu.as_ref().map_or(Footing::Cpu, |gpu| Footing::Gpu(gpu.uuid()));
            agree(&mut ring, footing, self.context.allow_shared_gpu, connected).map_err(broken)?;
            match gpu {
                Some(gpu) => {
                    // NCCL has no part in the memory that libtorch keeps.
                    peapod_kernels::release_unused_memory(self.context.device);
                    nccl::connect(ring, gpu, deadline).map_err(broken)?
                }
                None => Box::new(ring),
            }
        };
        collective = self.context.faults.over(collective, assignment.base_step);
        let held =
            self.state.as_ref().is_some_and(|state| state.step == assignment.base_step && state.generation == assignment.base_generation);
        let is_source = assignment.member_index == assignment.source_index;
        if is_source && !(held && assignment.checkpoint_step.is_none()) {
            self.state = None;
            self.state = Some(self.first_state(assignment, abort)?);
        }
        if assignment.broadcast_state {
            self.spread(assignment, collective.as_mut(), is_source, held, deadline)?;
        }
        match &self.state {
            Some(state) if state.step == assignment.base_step => {
                self.context.control.set_step(state.step);
                Ok(collective)
            }
            held => {
                let held = held.as_ref().map_or_else(|| "none".to_owned(), |state| state.step.to_string());
                let message = format!("holds step {held}, {} starts from step {}", assignment.generation, assignment.base_step);
                Err(Ended::Failed { phase: "connecting", message })
            }
        }
    }

    /// The GPU as NCCL uses it; `None` on the CPU.
    fn open_gpu(&mut self) -> Result<Option<Arc<NcclDevice>>, peapod_collective::Error> {
        if let (None, Device::Cuda(ordinal)) = (&self.gpu, self.context.device) {
            self.gpu = Some(NcclDevice::open(ordinal)?);
        }
        Ok(self.gpu.clone())
    }

    /// The state that nobody holds: of the checkpoint, or fresh.
    fn first_state(&self, assignment: &Assignment, abort: &AbortHandle) -> Result<TrainState, Ended> {
        let failed = |message: String| Ended::Failed { phase: "resuming", message };
        let (optimizer, ema) = (setup::adamw_config(&self.context.job), self.context.job.train.ema_decay);
        let Some(step) = assignment.checkpoint_step else {
            return self.fresh_state().map_err(failed);
        };
        let files = (self.context.download)(step, abort).map_err(|NotFetched { message, is_over }| match is_over {
            true => failed(message),
            // The next generation tries again: its models are loaded, and the coordinator or its store may be back.
            false => Ended::broken(message),
        })?;
        let part = |name: &str| files.iter().find(|(file, _)| file == name).map(|(_, bytes)| bytes.as_slice());
        let mut state = TrainState::from_checkpoint(self.adapter_config, optimizer, ema, self.context.device, step, part)
            .map_err(|error| failed(format!("checkpoint of step {step}: {error}")))?;
        // The networks' numbers may be others than before.
        state.loss_scale = setup::first_loss_scale(&self.context.job, self.context.device).map(|first| state.loss_scale.unwrap_or(first));
        Ok(state)
    }

    fn fresh_state(&self) -> Result<TrainState, String> {
        let (optimizer, ema) = (setup::adamw_config(&self.context.job), self.context.job.train.ema_decay);
        let mut state = TrainState::fresh(self.adapter_config, optimizer, ema, self.context.job.seed, self.context.device)
            .map_err(|error| error.to_string())?;
        state.loss_scale = setup::first_loss_scale(&self.context.job, self.context.device);
        Ok(state)
    }

    /// The source's state reaches those who lack it. Those who hold it take part and keep their own until the new one is whole.
    fn spread(
        &mut self,
        assignment: &Assignment,
        collective: &mut dyn Collective,
        is_source: bool,
        held: bool,
        deadline: Instant,
    ) -> Result<(), Ended> {
        let failed = |message: String| Ended::Failed { phase: "connecting", message };
        if !held && !is_source {
            // What it holds is of another line and must not be taken for the truth if this broadcast is cut off.
            self.state = None;
        }
        let mut scratch = match &self.state {
            Some(_) => None,
            None => Some(self.fresh_state().map_err(failed)?),
        };
        let shape = scratch.as_ref().or(self.state.as_ref());
        let mut bytes = match shape {
            Some(state) if is_source => state.to_bytes(),
            Some(state) => vec![0; state.num_bytes()],
            None => return Err(failed("no state to send or receive".into())),
        };
        let sent = collective.broadcast(&mut bytes, assignment.source_index.0, deadline);
        sent.map_err(|error| Ended::within(collective, error))?;
        if let Some(state) = &mut scratch {
            state.restore(&bytes).map_err(|error| failed(error.to_string()))?;
            state.generation = assignment.base_generation;
            self.state = scratch;
        }
        Ok(())
    }
}

/// Whether the share of a step whose sum did not arrive here is to be trained again.
///
/// The source's sum of a step holds every member's share, whoever else received that sum: what its weights hold is consumed.
fn is_void(in_flight: Step, base: Step) -> bool {
    in_flight > base
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn share_that_is_in_the_sources_weights_is_not_trained_again() {
        // The all-reduce of step 7 failed here. Where the source finished it, this member's samples are in its weights.
        assert!(!is_void(Step(7), Step(7)));
        assert!(!is_void(Step(7), Step(8)));
        assert!(is_void(Step(7), Step(6)));
    }
}
