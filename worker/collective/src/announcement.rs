//! What a member says it is about to do, so that members out of step find out instead of adding unrelated numbers.

use std::fmt;

/// The work in which an error happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Members find each other and build the communicator.
    Rendezvous,
    /// [`Collective::all_reduce_sum`](crate::Collective::all_reduce_sum).
    AllReduceSum,
    /// [`Collective::broadcast`](crate::Collective::broadcast) from member `root`.
    Broadcast {
        /// Whose bytes everybody gets.
        root: u32,
    },
    /// [`Collective::barrier`](crate::Collective::barrier).
    Barrier,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rendezvous => f.write_str("rendezvous"),
            Self::AllReduceSum => f.write_str("all_reduce_sum"),
            Self::Broadcast { root } => write!(f, "broadcast from member {root}"),
            Self::Barrier => f.write_str("barrier"),
        }
    }
}

/// One collective as its caller entered it. Members compare announcements before they exchange data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Announcement {
    /// How many collectives this communicator ran before.
    pub sequence: u64,
    /// The operation and, for a broadcast, its root.
    pub operation: Operation,
    /// Length of the caller's data in bytes.
    pub num_bytes: u64,
}

impl fmt::Display for Announcement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} bytes as collective {}", self.operation, self.num_bytes, self.sequence)
    }
}
