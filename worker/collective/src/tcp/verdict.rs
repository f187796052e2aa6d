//! Why a forming ended, as its members tell each other.
//!
//! Whoever fails closes its connections, and what the others then see of it names a member that is well. So it says first what it has seen.

use std::io;

use super::wire::{Fields, invalid};

/// What ended the forming, in the words of the member that saw it first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Member `by` has no connection with member `whom`.
    Lost { by: u32, whom: u32 },
    /// The deadline of member `by` passed: whoever lacks a link knows with whom.
    Overdue { by: u32 },
    /// Member `by` left for a reason that lies with no other member, such as an abort.
    Left { by: u32 },
}

/// Bytes of an encoded verdict.
pub(super) const VERDICT_BYTES: usize = 1 + 4 + 4;

impl Verdict {
    /// Encodes: kind, who says it, whom it has lost.
    pub(super) fn encode(self) -> [u8; VERDICT_BYTES] {
        let (kind, by, whom) = match self {
            Self::Lost { by, whom } => (1, by, whom),
            Self::Overdue { by } => (2, by, 0),
            Self::Left { by } => (3, by, 0),
        };
        let mut bytes = [kind; VERDICT_BYTES];
        bytes[1..5].copy_from_slice(&by.to_le_bytes());
        bytes[5..9].copy_from_slice(&whom.to_le_bytes());
        bytes
    }

    /// Decodes what [`encode`](Self::encode) made.
    pub(super) fn decode(bytes: &[u8]) -> io::Result<Self> {
        let mut fields = Fields(bytes);
        match (fields.byte()?, fields.u32()?, fields.u32()?) {
            (1, by, whom) => Ok(Self::Lost { by, whom }),
            (2, by, 0) => Ok(Self::Overdue { by }),
            (3, by, 0) => Ok(Self::Left { by }),
            _ => Err(invalid("unknown end of a forming")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_survive_the_wire() {
        for verdict in [Verdict::Lost { by: 7, whom: u32::MAX }, Verdict::Overdue { by: 1 << 20 }, Verdict::Left { by: 3 }] {
            assert_eq!(Verdict::decode(&verdict.encode()).unwrap(), verdict);
        }
        for bytes in [&[9; VERDICT_BYTES][..], &[1; VERDICT_BYTES - 1], &[]] {
            assert!(Verdict::decode(bytes).is_err());
        }
    }
}
