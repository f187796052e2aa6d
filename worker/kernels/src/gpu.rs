//! Kernels on a GPU: compiled by NVRTC, launched through the driver on libtorch's stream.

use std::ffi::{CString, c_void};
use std::panic::catch_unwind;
use std::sync::Arc;

use cudarc::driver::sys::{self as cuda, CUdevice_attribute, CUfunction};
use cudarc::driver::{CudaContext, DriverError, result};
use tch::Kind;

use crate::error::Result;
use crate::graph::current_stream;
use crate::launch::{Kernel, Kernels, Launch, Shape};
use crate::{Error, compiler, registry};

/// What is compiled: what a GPU has beyond the language, and the kernels.
const SOURCE: &str = concat!(include_str!("../cuda/device.h"), include_str!("../cuda/kernels.cu"));
/// The oldest generation that converts to bf16.
const OLDEST_CAPABILITY: (i32, i32) = (8, 0);

/// The kernels of one kind on one GPU. What is loaded stays until the process ends.
struct Gpu {
    context: Arc<CudaContext>,
    ordinal: usize,
    functions: Vec<Function>,
}

/// A kernel that is loaded.
struct Function(CUfunction);

// SAFETY: the driver takes functions from any thread, and they live as long as the context.
unsafe impl Send for Function {}
// SAFETY: likewise; nothing changes them.
unsafe impl Sync for Function {}

/// Compiles the kernels for a GPU and loads them.
///
/// # Errors
/// [`Error::Gpu`]: no driver, no compiler, a GPU that is too old, or their answer.
pub(crate) fn open(ordinal: usize, kind: Kind) -> Result<Kernels> {
    let doing = "use the NVIDIA driver";
    // SAFETY: opens the driver's library and closes it again; its initialisers are the vendor's and have no preconditions.
    if !unsafe { cuda::is_culib_present() } {
        return Err(Error::Gpu { doing, answer: "libcuda.so.1 is not on this machine".into() });
    }
    // What a driver lacks is a panic in cudarc.
    catch_unwind(|| load(ordinal, kind)).unwrap_or_else(|_| Err(Error::Gpu { doing, answer: "it lacks functions of CUDA 13".into() }))
}

fn load(ordinal: usize, kind: Kind) -> Result<Kernels> {
    let failed = |doing| move |error: DriverError| Error::Gpu { doing, answer: error.to_string() };
    let context = CudaContext::new(ordinal).map_err(failed("open the GPU"))?;
    let ask = |attribute| context.attribute(attribute).map_err(failed("read the GPU's attributes"));
    let major = ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let num_processors = ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    if (major, minor) < OLDEST_CAPABILITY {
        let answer = format!("this GPU has compute capability {major}.{minor}, the kernels need 8.0");
        return Err(Error::Gpu { doing: "compile for it", answer });
    }
    let image = compile(kind, &format!("sm_{major}{minor}"))?;
    context.bind_to_thread().map_err(failed("use the GPU"))?;
    // SAFETY: the image is what the compiler made for this GPU; the context is this thread's.
    let module = unsafe { result::module::load_data(image.as_ptr().cast()) }.map_err(failed("load the kernels"))?;
    let function = |kernel: Kernel| {
        let name = CString::new(kernel.name()).unwrap_or_default();
        // SAFETY: the module was loaded above and is never unloaded.
        Ok(Function(unsafe { result::module::get_function(module, name) }.map_err(failed("find a kernel"))?))
    };
    let functions = Kernel::ALL.into_iter().map(function).collect::<Result<_>>()?;
    let num_processors = u32::try_from(num_processors).unwrap_or(1).max(1);
    Ok(Kernels::new(kind, num_processors, Arc::new(Gpu { context, ordinal, functions })))
}

impl Launch for Gpu {
    fn launch(&self, kernel: Kernel, shape: Shape, arguments: &[u64]) -> Result<()> {
        let failed = |error: DriverError| Error::Gpu { doing: "launch a kernel", answer: format!("{}: {error}", kernel.name()) };
        // Backward passes run on threads of libtorch's.
        self.context.bind_to_thread().map_err(failed)?;
        let stream = current_stream(self.ordinal)?.cast();
        let Function(function) = self.functions[kernel as usize];
        let mut pointers: Vec<*mut c_void> = arguments.iter().map(|argument| std::ptr::from_ref(argument).cast_mut().cast()).collect();
        let (grid, block) = ((shape.grid[0], shape.grid[1], 1), (shape.threads, 1, 1));
        // SAFETY: the function is loaded in this context; the arguments are those that its operator gives it, of tensors on this GPU which
        // the allocator keeps from others until this stream is past the launch; the driver copies them before it returns.
        unsafe { result::launch_kernel(function, grid, block, shape.shared_bytes, stream, &mut pointers) }.map_err(failed)
    }
}

/// Compiles the kernels to what a GPU of an architecture such as `sm_90` runs. Needs no GPU.
///
/// # Errors
/// [`Error::Gpu`] if there is no NVRTC, or with its messages.
fn compile(kind: Kind, architecture: &str) -> Result<Vec<u8>> {
    let options = [
        format!("--gpu-architecture={architecture}"),
        format!("-DKIND={}", registry::number(kind)),
        "--std=c++17".into(),
        "--device-as-default-execution-space".into(),
        "--disable-warnings".into(),
    ];
    let options = options.map(|option| CString::new(option).unwrap_or_default());
    compiler::compile(&CString::new(SOURCE).unwrap_or_default(), &options)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where NVRTC is, it compiles without a GPU: `make test-all` fetches it.
    #[test]
    fn kernels_compile_for_every_generation_in_every_kind() {
        for architecture in ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"] {
            for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
                match compile(kind, architecture) {
                    Ok(image) => assert!(image.starts_with(b"\x7fELF"), "{architecture} {kind:?}"),
                    Err(error) if error.to_string().contains("libnvrtc.so.13 is not on this machine") => {
                        assert!(std::env::var_os("PEAPOD_NVRTC").is_none(), "{error}");
                        eprintln!("skipped: {error}");
                        return;
                    }
                    Err(error) => panic!("{architecture} {kind:?}: {error}"),
                }
            }
        }
    }

    #[test]
    fn what_is_missing_is_said() {
        if let Err(error) = open(usize::MAX, Kind::BFloat16) {
            let text = error.to_string();
            assert!(
                text.starts_with("cannot use the NVIDIA driver: libcuda.so.1 is not") || text.starts_with("cannot open the GPU"),
                "{text}"
            );
        }
        if compiler::open_compiler().is_ok() {
            let refused = compile(Kind::Float, "sm_1").unwrap_err().to_string();
            assert!(refused.contains("sm_1") || refused.contains("gpu-architecture"), "{refused}");
        }
    }
}
