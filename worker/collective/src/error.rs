//! Why a collective did not happen.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use crate::tcp::Ports;
use crate::{Announcement, Operation};

/// Errors of building or using a communicator. Each of them ends it: the caller drops it and waits for the next generation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Somebody called [`AbortHandle::abort`](crate::AbortHandle::abort).
    #[error("collective aborted: {reason}")]
    Aborted {
        /// What the first caller of `abort` gave as the reason.
        reason: String,
    },

    /// A connection to a neighbour broke.
    ///
    /// The neighbour need not be the culprit: a member that fails or is aborted closes its connections too, which is how a loss travels
    /// round the ring.
    #[error("lost member {member_index} during {during}")]
    PeerLost {
        /// The neighbour.
        member_index: u32,
        /// What was running.
        during: Operation,
        /// What the socket said.
        source: io::Error,
    },

    /// A member could not be reached while the communicator formed.
    #[error("could not reach member {member_index} at {address} (workers need open ports between them: see --advertise and --ports)")]
    Unreachable {
        /// Who was called.
        member_index: u32,
        /// Where it says that it listens.
        address: SocketAddr,
        /// What the socket said.
        source: io::Error,
    },

    /// The communicator did not form, for a reason that another member has seen, or by the deadline.
    #[error("the members did not come together: {reason}")]
    Unformed {
        /// What is known of it here.
        reason: String,
        /// With whom this member has no connection, by its own word or that of the other; none if the fault lies elsewhere.
        lost: Option<u32>,
    },

    /// The deadline passed.
    #[error("deadline passed during {during}, waiting for member(s) {waiting_for:?}")]
    Timeout {
        /// What was running.
        during: Operation,
        /// The members this one was waiting for. In a collective that is a neighbour, which may itself be waiting for another.
        waiting_for: Vec<u32>,
    },

    /// The deadline passed before this member's GPU had come to the operation: what it was given before that is not done.
    #[error("this worker's GPU did not come to {during} in time: it hangs in what it computes before, see nvidia-smi and dmesg")]
    Stuck {
        /// What was to run.
        during: Operation,
    },

    /// A neighbour entered another collective than this member: one of the two skipped a call or passed another
    /// length or root.
    #[error("members out of step: this one entered {ours}, member {member_index} entered {theirs}")]
    Mismatch {
        /// The neighbour.
        member_index: u32,
        /// What this member entered.
        ours: Announcement,
        /// What the neighbour entered.
        theirs: Announcement,
    },

    /// A member and this one could not prove to each other that they belong to the same generation.
    #[error("handshake with member {member_index} at {address} failed: {reason}")]
    Handshake {
        /// Who was called.
        member_index: u32,
        /// Where.
        address: SocketAddr,
        /// What went wrong.
        reason: String,
    },

    /// Bootstrap bytes that this program cannot read.
    #[error("bad bootstrap: {reason}")]
    Bootstrap {
        /// What is wrong with them.
        reason: String,
    },

    /// None of the ports that this member may listen on is free.
    #[error("no port of {ports} is free for other workers to call (--ports): a host needs one for each of its workers")]
    NoPort {
        /// Those that were tried.
        ports: Ports,
    },

    /// A call that cannot be meant: a root outside the world, a member index outside it, a listener of another rendezvous.
    #[error("invalid argument: {reason}")]
    InvalidArgument {
        /// What is wrong, with the values.
        reason: String,
    },

    /// The communicator failed in an earlier call.
    #[error("communicator already failed: {first}")]
    Poisoned {
        /// The first error's text.
        first: String,
    },

    /// NCCL or the driver refused something, or one of their files is missing.
    #[error("cannot {doing}: {answer}")]
    Gpu {
        /// What was tried, as a bare verb.
        doing: &'static str,
        /// The answer, and what to do about it where that is known.
        answer: String,
    },

    /// NCCL did not come back from ending a communicator: the GPU may still be at work on it, and this process cannot go on.
    #[error("NCCL did not come back from an abort within {after:?}: this worker must be started again")]
    AbortHung {
        /// How long it was waited for.
        after: Duration,
    },

    /// The members cannot work together.
    #[error("the members do not fit together: {reason}")]
    Unfit {
        /// Who differs, and what to do.
        reason: String,
        /// Whether this member is one that the others can do without.
        is_odd: bool,
    },

    /// The operating system refused something that has nothing to do with a peer.
    #[error("{doing}")]
    Io {
        /// What was tried, as a bare verb.
        doing: &'static str,
        /// Its answer.
        source: io::Error,
    },
}

impl Error {
    /// With whom this member has no connection any more, as far as it can see itself. That member need not be the culprit; where it says
    /// the same of this one, their connection is.
    pub fn lost_member(&self) -> Option<u32> {
        match self {
            Self::PeerLost { member_index, .. } | Self::Unreachable { member_index, .. } | Self::Handshake { member_index, .. } => {
                Some(*member_index)
            }
            Self::Timeout { waiting_for, .. } => waiting_for.first().copied(),
            Self::Unformed { lost, .. } => *lost,
            _ => None,
        }
    }

    /// Names what was tried when the operating system refused.
    pub(crate) fn io(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { doing, source }
    }
}
