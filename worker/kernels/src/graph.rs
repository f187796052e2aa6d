//! Operators of our own in libtorch's graph: tch has no interface to them.

use std::ffi::{CStr, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use tch::{Device, Tensor};
use torch_sys::C_tensor;

use crate::Error;
use crate::error::{Result, message};

/// Bytes of a message from one language to the other, with its end; as in cuda/graph.cpp.
pub(crate) const MAX_PROBLEM: usize = 512;

/// Computes the gradients of the inputs from what was saved and from the gradients of the outputs; undefined gradients are `None`. The last
/// argument says which inputs' gradients are asked for.
type Backward = Box<dyn Fn(&[Tensor], &[Option<Tensor>], &[bool]) -> Result<Vec<Option<Tensor>>> + Send + Sync>;

type BackwardCall =
    unsafe extern "C" fn(*const c_void, *const *mut C_tensor, *const *mut C_tensor, *const bool, *mut *mut C_tensor, *mut c_char) -> bool;

unsafe extern "C" {
    fn peapod_is_recorded(inputs: *const *const C_tensor, num_inputs: usize) -> bool;
    fn peapod_record(
        inputs: *const *const C_tensor,
        num_inputs: usize,
        outputs: *const *const C_tensor,
        num_outputs: usize,
        saved: *const *const C_tensor,
        num_saved: usize,
        state: *mut c_void,
        backward: BackwardCall,
        release: unsafe extern "C" fn(*mut c_void),
        problem: *mut c_char,
    ) -> bool;
    fn peapod_pin(tensor: *const C_tensor, pinned: *mut *mut C_tensor, problem: *mut c_char) -> bool;
    fn peapod_release_unused_memory(problem: *mut c_char) -> bool;
    fn peapod_current_stream(device: i32, stream: *mut *mut c_void, problem: *mut c_char) -> bool;
}

/// The way back through a step, as the graph keeps it.
struct Way {
    backward: Backward,
    num_inputs: usize,
    num_outputs: usize,
    num_saved: usize,
}

/// Whether the graph is to hold a step from `inputs`: gradients are on, and one of them wants one.
pub(crate) fn is_recorded(inputs: &[&Tensor]) -> bool {
    let inputs = pointers(inputs);
    // SAFETY: as many valid tensors as it is told.
    unsafe { peapod_is_recorded(inputs.as_ptr(), inputs.len()) }
}

/// Puts a step into the graph. `outputs` were computed from `inputs` without a graph; `saved` are what the way back needs of both, or
/// tensors of its own. libtorch refuses the way back if a saved tensor is changed meanwhile.
///
/// # Errors
/// [`Error::Gpu`] with libtorch's message.
pub(crate) fn record(inputs: &[&Tensor], outputs: &[&Tensor], saved: &[&Tensor], backward: Backward) -> Result<()> {
    let way = Way { backward, num_inputs: inputs.len(), num_outputs: outputs.len(), num_saved: saved.len() };
    let (inputs, outputs, saved) = (pointers(inputs), pointers(outputs), pointers(saved));
    let mut problem = [0; MAX_PROBLEM];
    // SAFETY: as many valid tensors as it is told; the state is the step's from here on, which hands it to `go_back` and at its end to
    // `release`.
    let is_done = unsafe {
        peapod_record(
            inputs.as_ptr(),
            inputs.len(),
            outputs.as_ptr(),
            outputs.len(),
            saved.as_ptr(),
            saved.len(),
            Box::into_raw(Box::new(way)).cast(),
            go_back,
            release,
            problem.as_mut_ptr(),
        )
    };
    check(is_done, "record a fused operator", &problem)
}

/// The stream that libtorch works on at the moment on a GPU, as the driver calls it.
///
/// # Errors
/// [`Error::Gpu`] if libtorch has no such GPU.
pub fn current_stream(ordinal: usize) -> Result<*mut c_void> {
    let (mut stream, mut problem) = (ptr::null_mut(), [0; MAX_PROBLEM]);
    let ordinal = i32::try_from(ordinal).unwrap_or(i32::MAX);
    // SAFETY: writes one pointer, or a message.
    let is_done = unsafe { peapod_current_stream(ordinal, &mut stream, problem.as_mut_ptr()) };
    check(is_done, "ask libtorch for its stream", &problem)?;
    Ok(stream)
}

/// A copy of a tensor on the host, on pages that a GPU reads and writes by itself.
///
/// # Errors
/// [`Error::Gpu`] with libtorch's message: there is no GPU, or the system gives no more such pages.
pub fn pinned(tensor: &Tensor) -> Result<Tensor> {
    let (mut pinned, mut problem) = (ptr::null_mut(), [0; MAX_PROBLEM]);
    // SAFETY: a valid tensor; writes one that is the caller's, or a message.
    let is_done = unsafe { peapod_pin(tensor.as_ptr(), &mut pinned, problem.as_mut_ptr()) };
    check(is_done, "pin memory", &problem)?;
    // SAFETY: it was made for this.
    Ok(unsafe { Tensor::from_ptr(pinned) })
}

/// Gives memory of GPUs that libtorch keeps for tensors to come back to the driver: NCCL allocates for itself, and pieces of the wrong size
/// are in the way of larger tensors. It waits for the work that GPUs have. Nothing happens on the CPU.
pub fn release_unused_memory(device: Device) {
    if !device.is_cuda() {
        return;
    }
    let mut problem = [0; MAX_PROBLEM];
    // SAFETY: writes a message at most.
    let is_done = unsafe { peapod_release_unused_memory(problem.as_mut_ptr()) };
    if let Err(error) = check(is_done, "release a GPU's unused memory", &problem) {
        tracing::debug!("{error}");
    }
}

pub(crate) fn pointers(tensors: &[&Tensor]) -> Vec<*const C_tensor> {
    tensors.iter().map(|tensor| tensor.as_ptr()).collect()
}

/// What a call of the shim said: nothing, or libtorch's message.
pub(crate) fn check(is_done: bool, doing: &'static str, problem: &[c_char; MAX_PROBLEM]) -> Result<()> {
    if is_done {
        return Ok(());
    }
    // SAFETY: whoever writes a message ends it within the array.
    let answer = unsafe { CStr::from_ptr(problem.as_ptr()) }.to_string_lossy().into_owned();
    Err(Error::Gpu { doing, answer })
}

/// Called by the graph on the way back, maybe on a thread of libtorch's.
///
/// # Safety
/// `way` is that of the step; the arrays have its numbers of saved tensors, outputs, inputs and inputs; tensors that come in are the
/// callee's, those that go out the caller's; `problem` has room for a message.
unsafe extern "C" fn go_back(
    way: *const c_void,
    saved: *const *mut C_tensor,
    gradients: *const *mut C_tensor,
    wanted: *const bool,
    results: *mut *mut C_tensor,
    problem: *mut c_char,
) -> bool {
    // SAFETY: the caller's promises above.
    let (way, saved, gradients, wanted) = unsafe {
        let way = &*way.cast::<Way>();
        let own = |tensor: *mut C_tensor| Tensor::from_ptr(tensor);
        let saved: Vec<Tensor> = (0..way.num_saved).map(|index| own(*saved.add(index))).collect();
        let gradients: Vec<Option<Tensor>> = (0..way.num_outputs)
            .map(|index| {
                let gradient = *gradients.add(index);
                (!gradient.is_null()).then(|| own(gradient))
            })
            .collect();
        (way, saved, gradients, std::slice::from_raw_parts(wanted, way.num_inputs))
    };
    // A panic must not reach C++.
    let found = catch_unwind(AssertUnwindSafe(|| (way.backward)(&saved, &gradients, wanted)));
    let said = match found {
        Ok(Ok(found)) => {
            for (index, gradient) in found.into_iter().take(way.num_inputs).enumerate() {
                if let Some(mut gradient) = gradient {
                    // SAFETY: room for as many as there are inputs; the caller frees what it is given.
                    unsafe { *results.add(index) = gradient.as_mut_ptr() };
                    std::mem::forget(gradient);
                }
            }
            return true;
        }
        Ok(Err(error)) => error.to_string(),
        Err(panic) => message(&*panic).unwrap_or_else(|| "the way back through a fused operator panicked".into()),
    };
    let text: Vec<c_char> = said.bytes().filter(|&byte| byte != 0).take(MAX_PROBLEM - 1).map(|byte| byte as c_char).chain([0]).collect();
    // SAFETY: no more than there is room for.
    unsafe { ptr::copy_nonoverlapping(text.as_ptr(), problem, text.len()) };
    false
}

/// # Safety
/// `way` came from a box, and the step that held it is gone.
unsafe extern "C" fn release(way: *mut c_void) {
    // SAFETY: the caller's promise.
    drop(unsafe { Box::from_raw(way.cast::<Way>()) });
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tch::{Kind, no_grad};

    use super::*;

    /// `x * y` with a way back that is ours.
    fn product(x: &Tensor, y: &Tensor) -> Tensor {
        let product = no_grad(|| x * y);
        if is_recorded(&[x, y]) {
            let back: Backward = Box::new(|saved, gradients, wanted| {
                let gradient = gradients[0].as_ref();
                let towards = |index: usize| wanted[index].then(|| gradient.map(|gradient| gradient * &saved[1 - index])).flatten();
                Ok(vec![towards(0), towards(1)])
            });
            record(&[x, y], &[&product], &[x, y], back).unwrap();
        }
        product
    }

    fn leaf(values: &[f32]) -> Tensor {
        Tensor::from_slice(values).set_requires_grad(true)
    }

    #[test]
    fn gradients_of_our_own_flow_with_those_of_libtorch() {
        let (x, y) = (leaf(&[1.0, 2.0, 3.0]), leaf(&[4.0, 5.0, 6.0]));
        let loss = (product(&(&x + 1.0), &y) * 2.0).sum(Kind::Float);
        let gradients = Tensor::f_run_backward(&[&loss], &[&x, &y], false, false).unwrap();
        assert_eq!(gradients[0], Tensor::from_slice(&[8.0_f32, 10.0, 12.0]));
        assert_eq!(gradients[1], Tensor::from_slice(&[4.0_f32, 6.0, 8.0]));
    }

    #[test]
    fn only_what_is_asked_for_is_recorded_and_computed() {
        let (x, constant) = (leaf(&[1.0, 2.0]), Tensor::from_slice(&[3.0_f32, 4.0]));
        assert!(!is_recorded(&[&constant]) && is_recorded(&[&x, &constant]) && !no_grad(|| is_recorded(&[&x])));
        assert!(!no_grad(|| product(&x, &constant)).requires_grad());
        let made = product(&x, &constant);
        assert!(made.requires_grad());
        made.sum(Kind::Float).backward();
        assert_eq!(x.grad(), constant);
    }

    /// Also where the graph keeps what hangs on it: an output.
    #[test]
    fn state_lives_as_long_as_the_graph() {
        let held = Arc::new(());
        let x = leaf(&[1.0]);
        let made = no_grad(|| &x * 1.0);
        let kept = Arc::clone(&held);
        let back = move |_: &[Tensor], gradients: &[Option<Tensor>], _: &[bool]| {
            let factor = Arc::strong_count(&kept) as i64;
            Ok(vec![gradients[0].as_ref().map(|gradient| gradient * factor)])
        };
        record(&[&x], &[&made], &[&x, &made], Box::new(back)).unwrap();
        assert_eq!(Arc::strong_count(&held), 2);
        made.sum(Kind::Float).backward();
        assert_eq!(x.grad(), Tensor::from_slice(&[2.0_f32]));
        assert_eq!(Arc::strong_count(&held), 2, "the output still hangs on it");
        drop(made);
        assert_eq!(Arc::strong_count(&held), 1);
    }

    #[test]
    fn what_fails_on_the_way_back_is_an_error_with_its_words() {
        let failing = |back: Backward| {
            let x = leaf(&[1.0]);
            let made = no_grad(|| &x * 1.0);
            record(&[&x], &[&made], &[&x], back).unwrap();
            let loss = made.sum(Kind::Float);
            Tensor::f_run_backward(&[&loss], &[&x], false, false).unwrap_err().to_string()
        };
        let refused = failing(Box::new(|_, _, _| Err(Error::Gpu { doing: "go back", answer: "there is no way".into() })));
        assert!(refused.contains("cannot go back: there is no way"), "{refused}");
        let panicked = failing(Box::new(|_, _, _| panic!("lost {}", "its way")));
        assert!(panicked.contains("lost its way"), "{panicked}");
        let long = failing(Box::new(|_, _, _| Err(Error::Gpu { doing: "say", answer: "no".repeat(1000) })));
        assert!(long.contains("nonono") && !long.contains(&"no".repeat(300)));
    }

    #[test]
    fn a_second_way_back_and_a_changed_tensor_are_refused() {
        let x = leaf(&[1.0, 2.0]);
        let y = &x * 1.0;
        let mut z = &x * 3.0;
        let loss = product(&y, &z).sum(Kind::Float);
        let _ = z.g_add_scalar_(1.0);
        let changed = Tensor::f_run_backward(&[&loss], &[&x], false, false).unwrap_err().to_string();
        assert!(changed.contains("modified by an inplace operation"), "{changed}");

        let loss = product(&x, &x).sum(Kind::Float);
        assert!(Tensor::f_run_backward(&[&loss], &[&x], true, false).is_ok());
        assert!(Tensor::f_run_backward(&[&loss], &[&x], false, false).is_ok());
        assert!(Tensor::f_run_backward(&[&loss], &[&x], false, false).is_err());
        let loss = product(&x, &x).sum(Kind::Float);
        let twice = Tensor::f_run_backward(&[&loss], &[&x], true, true).unwrap_err().to_string();
        assert!(twice.contains("no second derivative"), "{twice}");
    }

    #[test]
    fn no_stream_and_no_pinned_memory_without_a_gpu() {
        if tch::Cuda::is_available() {
            assert_eq!(pinned(&leaf(&[1.0, 2.0])).unwrap(), Tensor::from_slice(&[1.0_f32, 2.0]));
        } else {
            assert!(current_stream(0).is_err());
            let mut problem = [0; MAX_PROBLEM];
            // SAFETY: writes a message at most.
            assert!(!unsafe { peapod_release_unused_memory(problem.as_mut_ptr()) }, "there is nothing to release");
            assert!(check(false, "release", &problem).unwrap_err().to_string().len() > "cannot release: ".len());
            assert!(pinned(&leaf(&[1.0])).unwrap_err().to_string().starts_with("cannot pin memory: "));
        }
        assert_eq!(leaf(&[0.0]).device(), Device::Cpu);
    }
}
