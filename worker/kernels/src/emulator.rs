//! The kernels on the processor: the same source, compiled as C++, with a block's threads taking turns.
//!
//! Slow, for tests where there is no GPU. The compiler is that of the build (`CXX`, else `c++`).

use std::cell::Cell;
use std::ffi::c_void;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use libloading::os::unix::Library;
use tch::{Device, Kind};

use crate::error::Result;
use crate::launch::{Kernel, Kernels, Launch, Shape};
use crate::registry::{name, number};

/// As if the processor had a few: some maps are then cut into several blocks and others are not.
const NUM_PROCESSORS: u32 = 3;

type Emulated = unsafe extern "C" fn(*const u32, *const *mut c_void);

/// Launches so far, in all kinds.
static NUM_LAUNCHES: AtomicUsize = AtomicUsize::new(0);

struct Emulator {
    functions: Vec<Emulated>,
}

thread_local! {
    static IS_ASKED_FOR: Cell<bool> = const { Cell::new(false) };
}

/// How many kernels were launched by this process so far.
#[must_use]
pub fn num_launches() -> usize {
    NUM_LAUNCHES.load(Ordering::Relaxed)
}

/// Builds networks on the CPU with fused operators while `build` runs on this thread.
pub fn with<T>(build: impl FnOnce() -> T) -> T {
    struct Before(bool);
    impl Drop for Before {
        fn drop(&mut self) {
            IS_ASKED_FOR.set(self.0);
        }
    }
    let _before = Before(IS_ASKED_FOR.replace(true));
    build()
}

pub(crate) fn asked_for(device: Device, kind: Kind) -> Option<Kernels> {
    (device == Device::Cpu && IS_ASKED_FOR.get() && name(kind).is_some()).then(|| kernels(kind))
}

/// The emulated kernels of a kind, compiled when they are first asked for.
///
/// # Panics
/// If there is no compiler, or with its messages: this is for tests.
#[must_use]
#[expect(clippy::panic, clippy::expect_used, reason = "a test without its tools fails")]
pub fn kernels(kind: Kind) -> Kernels {
    static MADE: [OnceLock<Arc<Emulator>>; 3] = [const { OnceLock::new() }; 3];
    let emulator = MADE[number(kind) as usize].get_or_init(|| {
        let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/cuda"));
        let made = tempfile::tempdir().expect("a folder for the emulated kernels");
        let library = made.path().join("emulated.so");
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
        let mut command = Command::new(&compiler);
        command.args(["-std=c++17", "-O2", "-fPIC", "-shared"]).arg(format!("-DKIND={}", number(kind)));
        let output = command.arg(folder.join("emulated.cpp")).arg("-o").arg(&library).output();
        let output = output.unwrap_or_else(|error| panic!("{compiler}: {error}"));
        assert!(output.status.success(), "{compiler}: {}", String::from_utf8_lossy(&output.stderr));
        // SAFETY: our own library, whose initialisers do nothing; its functions have this signature, see cuda/emulated.cpp.
        unsafe {
            let library = Library::new(&library).expect("the emulated kernels");
            let function = |kernel: Kernel| {
                let symbol = library.get::<Emulated>(format!("peapod_{}", kernel.name()));
                *symbol.expect("an emulated kernel")
            };
            let functions = Kernel::ALL.into_iter().map(function).collect();
            std::mem::forget(library);
            Arc::new(Emulator { functions })
        }
    });
    Kernels::new(kind, NUM_PROCESSORS, Arc::<Emulator>::clone(emulator))
}

impl Launch for Emulator {
    fn launch(&self, kernel: Kernel, shape: Shape, arguments: &[u64]) -> Result<()> {
        let pointers: Vec<*mut c_void> = arguments.iter().map(|argument| std::ptr::from_ref(argument).cast_mut().cast()).collect();
        let numbers = [shape.grid[0], shape.grid[1], shape.threads, shape.shared_bytes];
        // SAFETY: the arguments are those that the kernel's operator gives it, of tensors on the CPU that live meanwhile.
        unsafe { self.functions[kernel as usize](numbers.as_ptr(), pointers.as_ptr()) };
        NUM_LAUNCHES.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}
