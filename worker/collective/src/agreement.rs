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

/// Tells every member what the others compute on, and refuses worlds that cannot work: all members come to the same conclusion.
///
/// Errors: [`Error::Unfit`] if some have a GPU and some have not, or if two have the same one and `allow_shared_gpu` is not set; it says
/// whether this member is one of those that have to go. Those of the all-reduce.
pub fn agree(collective: &mut dyn Collective, ours: Footing, allow_shared_gpu: bool, deadline: Instant) -> Result<(), Error> {
    let mut slots = vec![0.0; SLOT * collective.num_members() as usize];
    let own = collective.member_index() as usize;
    slots[own * SLOT..(own + 1) * SLOT].copy_from_slice(&ours.to_slot());
    collective.all_reduce_sum(&mut slots, deadline)?;
    match judge(slots.as_chunks::<SLOT>().0, allow_shared_gpu) {
        None => Ok(()),
        Some(Misfit { reason, odd }) => Err(Error::Unfit { reason, is_odd: odd.contains(&own) }),
    }
}

/// Why members do not fit together, and which of them the others can do without.
struct Misfit {
    reason: String,
    odd: Vec<usize>,
}

fn judge(slots: &[[f32; SLOT]], allow_shared_gpu: bool) -> Option<Misfit> {
    let of = |kind: f32| -> Vec<usize> { (0..slots.len()).filter(|&index| slots[index][0] == kind).collect() };
    let (on_cpu, on_gpu) = (of(CPU), of(GPU));
    if let (Some(cpu), Some(gpu)) = (on_cpu.first(), on_gpu.first()) {
        let reason = format!(
            "{} member(s) train on the CPU (the first is member {cpu}) and {} on a GPU (the first is member {gpu}): start all workers of \
             a job with the same kind of --device",
            on_cpu.len(),
            on_gpu.len()
        );
        // A GPU does the work of many processors: whoever has none was not meant to be here.
        return Some(Misfit { reason, odd: on_cpu });
    }
    let twin = |index: usize| slots[..index].iter().position(|slot| slot[0] == GPU && *slot == slots[index]);
    let twins: Vec<(usize, usize)> = (0..slots.len()).filter_map(|index| Some((twin(index)?, index))).collect();
    let &(first, second) = twins.first().filter(|_| !allow_shared_gpu)?;
    let reason = format!(
        "members {first} and {second} have the same GPU: give each worker of a host a --device cuda:N of its own, or start all workers \
         with --allow-shared-gpu"
    );
    Some(Misfit { reason, odd: twins.into_iter().map(|(_, second)| second).collect() })
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
        assert!(judge(&slots(&[Footing::Cpu, Footing::Cpu]), false).is_none());
        assert!(judge(&slots(&[gpu(1), gpu(2), gpu(255)]), false).is_none());
        let Misfit { reason, odd } = judge(&slots(&[gpu(1), Footing::Cpu, gpu(2)]), true).unwrap();
        assert_eq!(odd, [1], "the rest can go on");
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
        let Misfit { reason, odd } = judge(&members, false).unwrap();
        assert!(reason.starts_with("members 1 and 2 have the same GPU") && reason.contains("--allow-shared-gpu"), "{reason}");
        assert_eq!(odd, [2], "whoever has it first keeps it");
        assert!(judge(&members, true).is_none());
    }

    #[test]
    fn a_world_of_one_is_fit() {
        let mut solo = SoloCollective::new(AbortHandle::new());
        agree(&mut solo, Footing::Gpu([3; 16]), false, Instant::now()).unwrap();
    }
}
