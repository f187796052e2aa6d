//! libtorch's errors where they reach Rust as panics: what they say.

use std::any::Any;

/// What the payload of a caught panic says; libtorch appends a backtrace to its first line.
#[must_use]
pub fn message(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<String>().map(String::as_str).or_else(|| payload.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without a message")
}

/// Whether a device has failed for want of memory alone, after which it can be used as before.
#[must_use]
pub fn is_out_of_memory(problem: &str) -> bool {
    // cuBLAS and cuDNN allocate beside libtorch, when a thread first computes with them, and have words of their own.
    ["out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"].iter().any(|words| problem.contains(words))
}

#[cfg(test)]
mod tests {
    use std::panic::{catch_unwind, panic_any};

    use super::*;

    #[test]
    fn panics_of_every_kind_say_something() {
        let said = |panics: fn()| message(catch_unwind(panics).unwrap_err().as_ref()).to_owned();
        assert_eq!(said(|| panic!("CUDA {}", "out of memory")), "CUDA out of memory");
        assert_eq!(said(|| panic!("short")), "short");
        assert_eq!(said(|| panic_any(3)), "a panic without a message");
        assert!(is_out_of_memory("CUDA out of memory. Tried to allocate 2.00 GiB") && !is_out_of_memory("an illegal instruction"));
        assert!(is_out_of_memory("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"));
    }
}
