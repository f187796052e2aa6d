//! Whether the members of a new generation can work together: what each of them computes on.

use std::time::Instant;

use crate::{Collective, Error};

/// What a member computes on. Members with and without a GPU have different communicators and cannot form one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Footing {
    /// The processor.
    Cpu,
    /// A GPU with this UUID, which no other GPU in the world has.
    Gpu([u8; 16]),
}

/// A member's slot: a code for the kind, then the UUID in pieces that an `f32` holds exactly.
const SLOT: usize = 1 + 8;
const CPU: f32 = 1.0;
const GPU: f32 = 2.0;

impl Footing {
    fn to_slot(self) -> [f32; SLOT] {
        let mut slot = [0.0; SLOT];
        match self {
            Self::Cpu => slot[0] = CPU,
            Self::Gpu(uuid) => {
                slot[0] = GPU;
                for (piece, bytes) in slot[1..].iter_mut().zip(uuid.as_chunks::<2>().0) {
                    *piece = f32::from(u16::from_le_bytes(*bytes));
                }
            }
        }
        slot
    }
}

/// Tells every member what the others compute on, and refuses worlds that cannot work: the same answer on all members.
///
/// Errors: [`Error::Unfit`] if some have a GPU and some have not, or if two have the same one and `allow_shared_gpu` is not set; those of
/// the all-reduce.
pub fn agree(collective: &mut dyn Collective, ours: Footing, allow_shared_gpu: bool, deadline: Instant) -> Result<(), Error> {
    let mut slots = vec![0.0; SLOT * collective.num_members() as usize];
    let own = collective.member_index() as usize * SLOT;
    slots[own..own + SLOT].copy_from_slice(&ours.to_slot());
    collective.all_reduce_sum(&mut slots, deadline)?;
    judge(slots.as_chunks::<SLOT>().0, allow_shared_gpu).map_or(Ok(()), |reason| Err(Error::Unfit { reason }))
}

fn judge(slots: &[[f32; SLOT]], allow_shared_gpu: bool) -> Option<String> {
    let of = |kind: f32| slots.iter().position(|slot| slot[0] == kind);
    if let (Some(cpu), Some(gpu)) = (of(CPU), of(GPU)) {
        let counts = [CPU, GPU].map(|kind| slots.iter().filter(|slot| slot[0] == kind).count());
        return Some(format!(
            "{} member(s) train on the CPU (the first is member {cpu}) and {} on a GPU (the first is member {gpu}): start all workers of \
             a job with the same kind of --device",
            counts[0], counts[1]
        ));
    }
    let twin = |index: usize| slots[..index].iter().position(|slot| slot[0] == GPU && *slot == slots[index]);
    let (first, second) = (0..slots.len()).find_map(|index| Some((twin(index)?, index))).filter(|_| !allow_shared_gpu)?;
    Some(format!(
        "members {first} and {second} have the same GPU: give each worker of a host a --device cuda:N of its own, or start all workers \
         with --allow-shared-gpu"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AbortHandle, SoloCollective};

    fn slots(members: &[Footing]) -> Vec<[f32; SLOT]> {
        members.iter().map(|member| member.to_slot()).collect()
    }

    #[test]
    fn worlds_of_one_kind_are_fit_and_mixed_ones_say_who_differs() {
        let gpu = |number| Footing::Gpu([number; 16]);
        assert_eq!(judge(&slots(&[Footing::Cpu, Footing::Cpu]), false), None);
        assert_eq!(judge(&slots(&[gpu(1), gpu(2), gpu(255)]), false), None);
        let reason = judge(&slots(&[gpu(1), Footing::Cpu, gpu(2)]), true).unwrap();
        assert!(
            reason.starts_with("1 member(s) train on the CPU (the first is member 1) and 2 on a GPU (the first is member 0)"),
            "{reason}"
        );
    }

    #[test]
    fn one_gpu_for_two_members_needs_permission() {
        let mut other = [7; 16];
        other[15] = 8;
        let members = slots(&[Footing::Gpu(other), Footing::Gpu([7; 16]), Footing::Gpu([7; 16])]);
        let reason = judge(&members, false).unwrap();
        assert!(reason.starts_with("members 1 and 2 have the same GPU") && reason.contains("--allow-shared-gpu"), "{reason}");
        assert_eq!(judge(&members, true), None);
    }

    #[test]
    fn a_world_of_one_is_fit() {
        let mut solo = SoloCollective::new(AbortHandle::new());
        agree(&mut solo, Footing::Gpu([3; 16]), false, Instant::now()).unwrap();
    }
}
