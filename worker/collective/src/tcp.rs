//! A ring of TCP connections, for workers on CPUs.
//!
//! ```
//! # use std::{net::{IpAddr, Ipv4Addr}, thread, time::{Duration, Instant}};
//! use peapod_collective::tcp::{Listener, Membership, Ports, TcpCollective};
//! use peapod_collective::{AbortHandle, Collective};
//!
//! # fn main() -> Result<(), peapod_collective::Error> {
//! let local = IpAddr::from(Ipv4Addr::LOCALHOST);
//! let soon = || Instant::now() + Duration::from_secs(10);
//! let at_zero = Listener::open(local, local, Ports::ANY)?;
//! let bootstrap = at_zero.bootstrap()?; // travels to the other members as bytes
//!
//! # let guest_bootstrap = bootstrap.clone();
//! let other = thread::spawn(move || {
//!     let (us, at_one) = (Membership { generation: 1, member_index: 1, num_members: 2 }, Listener::open(local, local, Ports::ANY)?);
//!     let mut one = TcpCollective::connect(&guest_bootstrap, us, at_one, AbortHandle::new(), soon())?;
//!     one.all_reduce_sum(&mut [2.0], soon())
//! });
//! let us = Membership { generation: 1, member_index: 0, num_members: 2 };
//! let mut zero = TcpCollective::connect(&bootstrap, us, at_zero, AbortHandle::new(), soon())?;
//! let mut data = [1.0];
//! zero.all_reduce_sum(&mut data, soon())?;
//! assert_eq!(data, [3.0]);
//! # other.join().map_err(|_| peapod_collective::Error::InvalidArgument { reason: "panicked".into() })?
//! # }
//! ```
//!
//! The calling thread does all the work, on sockets that do not block: sending, receiving and adding overlap through the kernel's buffers,
//! whatever their size. Each collective is announced by a header that the neighbours compare. A barrier then goes over everybody's
//! connection with member 0, on which it registered: round the ring it would take as many hops as there are members, twice. Nothing is
//! allocated per collective that moves data.
//!
//! Elements travel as little-endian `f32`, straight from and to the caller's memory.

mod bootstrap;
mod exchange;
mod handshake;
mod links;
mod rendezvous;
mod socket;
mod star;
mod verdict;
mod wire;

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

pub use bootstrap::{Bootstrap, Listener, Ports};

use crate::solo::check_root;
use crate::{AbortHandle, Announcement, Collective, Error, OnAbort, Operation, Stall, Values};
use exchange::{NoData, RingCopy, RingSum, SEGMENT_BYTES};
use links::Links;

#[cfg(target_endian = "big")]
compile_error!("elements are sent as they lie in memory, and the wire is little-endian");

/// The member that the others register with.
const MEMBER_ZERO: u32 = 0;

/// One member's place in a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Membership {
    /// The generation; members of another one are refused.
    pub generation: u64,
    /// This member's place, in `0..num_members`.
    pub member_index: u32,
    /// How many members the generation has.
    pub num_members: u32,
}

impl Membership {
    /// The member this one sends to.
    fn next(&self) -> u32 {
        (self.member_index + 1) % self.num_members
    }

    /// The member this one receives from.
    fn previous(&self) -> u32 {
        (self.member_index + self.num_members - 1) % self.num_members
    }
}

/// One member's end of a ring of TCP connections.
pub struct TcpCollective {
    membership: Membership,
    /// None in a world of one.
    ring: Option<Ring>,
    abort: AbortHandle,
    /// How many collectives were entered.
    sequence: u64,
    failure: Option<String>,
    stalled: Option<Stall>,
}

struct Ring {
    links: Arc<Links>,
    /// Where elements to be added arrive.
    scratch: Vec<f32>,
    /// Closes the links on abort.
    _on_abort: OnAbort,
}

impl TcpCollective {
    /// Forms the communicator of a generation; returns when every member's links are up.
    ///
    /// `listener` is this member's own; member 0 passes the one that `bootstrap` was made from. It is closed on return. `abort` breaks the
    /// forming as it later breaks collectives.
    ///
    /// Errors: [`Error::Unreachable`] if a member does not answer where it says that it listens; [`Error::Handshake`] if one does not share
    /// the key or the generation; [`Error::PeerLost`] if one dies meanwhile; [`Error::Unformed`] for what another has met, and at the
    /// deadline, naming who has not come; [`Error::Aborted`]; [`Error::InvalidArgument`] for an index outside the world or a listener that
    /// does not fit the bootstrap.
    pub fn connect(
        bootstrap: &Bootstrap,
        membership: Membership,
        listener: Listener,
        abort: AbortHandle,
        deadline: Instant,
    ) -> Result<Self, Error> {
        let Membership { member_index, num_members, .. } = membership;
        if member_index >= num_members {
            return Err(Error::InvalidArgument { reason: format!("member {member_index} in a world of {num_members}") });
        }
        if (member_index == MEMBER_ZERO) != (listener.advertised == bootstrap.address) {
            let (ours, theirs) = (listener.advertised, bootstrap.address);
            return Err(Error::InvalidArgument { reason: format!("member {member_index} listens on {ours}, the bootstrap says {theirs}") });
        }
        abort.check()?;
        let ring = match num_members {
            1 => None,
            _ => {
                let links = rendezvous::form(bootstrap, membership, &listener, &abort, deadline)?;
                Some(Ring::new(links, &abort))
            }
        };
        Ok(Self { membership, ring, abort, sequence: 0, failure: None, stalled: None })
    }

    /// Returns once every member has entered `operation` with the same length. Moves no data: for a backend that moves it in another way.
    ///
    /// Errors: those of a collective; [`Error::Mismatch`] if the members mean different things.
    pub(crate) fn meet(&mut self, operation: Operation, num_bytes: usize, deadline: Instant) -> Result<(), Error> {
        self.run(operation, num_bytes, |ring, announcement, abort| {
            ring.links.run(announcement, &mut NoData, abort, deadline).map_err(with_stall)?;
            ring.links.star.meet(&announcement, abort, deadline)
        })
    }

    /// Fails if a neighbour has closed its link. Takes nothing of what it sent.
    pub(crate) fn check_links(&self, during: Operation) -> Result<(), Error> {
        self.ring.as_ref().map_or(Ok(()), |ring| ring.links.check(during))
    }

    /// Runs one collective, unless the communicator has ended; an error ends it.
    fn run(
        &mut self,
        operation: Operation,
        num_bytes: usize,
        work: impl FnOnce(&mut Ring, Announcement, &AbortHandle) -> Result<(), (Error, Option<Stall>)>,
    ) -> Result<(), Error> {
        self.abort.check()?;
        if let Some(first) = &self.failure {
            return Err(Error::Poisoned { first: first.clone() });
        }
        let announcement = Announcement { sequence: self.sequence, operation, num_bytes: num_bytes as u64 };
        self.sequence += 1;
        let outcome = match (operation, &mut self.ring) {
            (Operation::Broadcast { root }, _) if root >= self.membership.num_members => check_root(root, self.membership.num_members),
            (_, Some(ring)) => work(ring, announcement, &self.abort).map_err(|(error, stall)| {
                self.stalled = stall;
                error
            }),
            (_, None) => Ok(()),
        };
        outcome.map_err(|error| {
            self.failure = Some(error.to_string());
            if let Some(ring) = &self.ring {
                // The neighbours need not wait for their deadline to learn that nothing will come.
                ring.links.shutdown();
            }
            // An abort closes the sockets under a running call: the reason it gave says more than what the sockets then say.
            self.abort.check().err().unwrap_or(error)
        })
    }
}

impl Ring {
    fn new(links: Links, abort: &AbortHandle) -> Self {
        let links = Arc::new(links);
        let on_abort = abort.on_abort({
            let links = Arc::clone(&links);
            move || links.shutdown()
        });
        let scratch = vec![0.0; SEGMENT_BYTES / size_of::<f32>()];
        Self { links, scratch, _on_abort: on_abort }
    }
}

fn with_stall((error, stall): (Error, Stall)) -> (Error, Option<Stall>) {
    (error, Some(stall))
}

impl Drop for Ring {
    fn drop(&mut self) {
        // Not left to the last reference: an abort on another thread may hold one for a moment longer.
        self.links.shutdown();
    }
}

impl Collective for TcpCollective {
    fn member_index(&self) -> u32 {
        self.membership.member_index
    }

    fn num_members(&self) -> u32 {
        self.membership.num_members
    }

    fn all_reduce_sum_in(&mut self, values: Values<'_>, deadline: Instant) -> Result<(), Error> {
        let Values::Host(data) = values else {
            return Err(Error::InvalidArgument { reason: "a sum over TCP of values on a device".into() });
        };
        let Membership { member_index, num_members, .. } = self.membership;
        self.run(Operation::AllReduceSum, size_of_val(data), |ring, announcement, abort| {
            let mut sum = RingSum::new(data, &mut ring.scratch, member_index as usize, num_members as usize);
            ring.links.run(announcement, &mut sum, abort, deadline).map_err(with_stall)
        })
    }

    fn broadcast(&mut self, data: &mut [u8], root: u32, deadline: Instant) -> Result<(), Error> {
        let Membership { member_index, num_members, .. } = self.membership;
        self.run(Operation::Broadcast { root }, data.len(), |ring, announcement, abort| {
            let mut copy = RingCopy::new(data, root as usize, member_index as usize, num_members as usize);
            ring.links.run(announcement, &mut copy, abort, deadline).map_err(with_stall)
        })
    }

    fn barrier(&mut self, deadline: Instant) -> Result<(), Error> {
        self.meet(Operation::Barrier, 0, deadline)
    }

    fn stalled(&self) -> Option<Stall> {
        self.stalled
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }
}

impl fmt::Debug for TcpCollective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { membership, abort, sequence, failure, stalled, .. } = self;
        f.debug_struct("TcpCollective")
            .field("membership", membership)
            .field("abort", abort)
            .field("sequence", sequence)
            .field("failure", failure)
            .field("stalled", stalled)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
pub(crate) mod tests;
