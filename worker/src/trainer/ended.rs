//! Why a member's part in a generation ends.

use peapod_collective::Collective;
use peapod_proto::ids::MemberIndex;
use peapod_proto::message::{Stall, StopCause};

/// Why a generation ended for this member.
pub enum Ended {
    /// In order; with a reason if the exchange after the last step failed, which changes no weights.
    Orderly(StopCause, String),
    /// The collective failed or was aborted; by the loss of a neighbour, if that is known.
    Broken { reason: String, lost: Option<MemberIndex>, stalled: Option<Stall> },
    /// This worker cannot go on.
    Failed { phase: &'static str, message: String },
    /// Nor can another in its place: the job's workers do not fit together, or its data are another job's.
    Unfit { phase: &'static str, message: String },
}

impl Ended {
    pub fn broken(reason: String) -> Self {
        Self::Broken { reason, lost: None, stalled: None }
    }

    /// What an error of a collective means, with where this member was in it.
    pub fn within(collective: &dyn Collective, error: peapod_collective::Error) -> Self {
        let stall =
            |stall: peapod_collective::Stall| Stall { waiting_for: MemberIndex(stall.waiting_for), received_bytes: stall.received_bytes };
        match Self::by(error) {
            Self::Broken { reason, lost, .. } => Self::Broken { reason, lost, stalled: collective.stalled().map(stall) },
            other => other,
        }
    }

    /// What an error of the collective means, and which neighbour is behind it as far as this member can see.
    pub fn by(error: peapod_collective::Error) -> Self {
        match &error {
            // The others meet again without those.
            peapod_collective::Error::Unfit { is_odd: true, .. } => {
                return Self::Unfit { phase: "connecting", message: error.to_string() };
            }
            peapod_collective::Error::AbortHung { .. } => return Self::Failed { phase: "collective", message: error.to_string() },
            // The others wait for this one.
            peapod_collective::Error::Stuck { .. } => return Self::Failed { phase: "compute", message: error.to_string() },
            _ => {}
        }
        Self::Broken { reason: with_sources(&error), lost: error.lost_member().map(MemberIndex), stalled: None }
    }

    /// A step without weights: an error of this program.
    pub fn no_state() -> Self {
        Self::Failed { phase: "training", message: "no state".into() }
    }
}

/// An error with what is behind it, in one line.
pub fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
