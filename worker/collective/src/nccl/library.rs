//! The driver through cudarc, NCCL through a table of the functions used.
//!
//! cudarc looks for `libnccl.so` alone, which NVIDIA's package does not have, and panics where a function is missing: NCCL's own library is
//! opened here by its real name, and what it lacks is an error that names its version.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::panic::catch_unwind;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{self as cuda, CUevent_wait_flags, CUresult, CUstream};
use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtrMut, DriverError, result};
use cudarc::nccl::sys::{ncclDataType_t, ncclRedOp_t, ncclResult_t};
use libloading::Library;

use super::gpu::{Comm, Fault, Gpu, Progress, UNIQUE_ID_BYTES};
use crate::{DeviceValues, Error};

/// NCCL's only name in its package.
const NCCL_FILE: &str = "libnccl.so.2";
/// Non-blocking communicators are whole from here on.
const OLDEST_NCCL: c_int = 21_800;
/// The CUDA version of the driver that libtorch is built for.
const OLDEST_DRIVER: c_int = 13_000;

const SUCCESS: c_int = ncclResult_t::ncclSuccess as c_int;
const IN_PROGRESS: c_int = ncclResult_t::ncclInProgress as c_int;

/// The NVIDIA driver of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Driver {
    /// The CUDA version it supports, such as 13000.
    pub cuda_version: i32,
    /// GPUs that it shows to this process.
    pub num_devices: usize,
}

impl Driver {
    /// Looks for the driver.
    ///
    /// Errors: [`Error::Gpu`] if there is none, or one that is too old for libtorch, or that shows no GPU.
    pub fn probe() -> Result<Self, Error> {
        match Self::look()? {
            Self { num_devices: 0, .. } => {
                Err(no_driver("it shows no GPU to this process: see nvidia-smi and CUDA_VISIBLE_DEVICES".into()).into())
            }
            driver => Ok(driver),
        }
    }

    /// Whether this machine plainly has no GPU for this process: no driver, or one that shows none. Anything else that is wrong is a GPU
    /// that cannot be used.
    #[must_use]
    pub fn is_absent() -> bool {
        // SAFETY: as in `look`.
        !unsafe { cuda::is_culib_present() } || matches!(Self::look(), Ok(Self { num_devices: 0, .. }))
    }

    fn look() -> Result<Self, Fault> {
        let fault = no_driver;
        // SAFETY: opens the driver's library and closes it again; its initialisers are the vendor's and have no preconditions.
        if !unsafe { cuda::is_culib_present() } {
            return Err(fault("libcuda.so.1 is not on this machine: install NVIDIA driver 580 or newer".into()));
        }
        // What a driver lacks is a panic in cudarc.
        let found = catch_unwind(|| {
            let mut version = 0;
            // SAFETY: writes one int; needs no initialised driver.
            let answer = unsafe { cuda::cuDriverGetVersion(&mut version) };
            (answer, version, CudaContext::device_count())
        });
        let Ok((answer, cuda_version, devices)) = found else {
            return Err(fault("it lacks functions of CUDA 13: install NVIDIA driver 580 or newer".into()));
        };
        if answer == CUresult::CUDA_SUCCESS && cuda_version < OLDEST_DRIVER {
            let (major, minor) = (cuda_version / 1000, cuda_version % 1000 / 10);
            return Err(fault(format!("it is made for CUDA {major}.{minor} and libtorch needs 13.0: install NVIDIA driver 580 or newer")));
        }
        let num_devices = match devices {
            Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => 0,
            Err(error) => return Err(fault(error.to_string())),
            Ok(count) => usize::try_from(count).unwrap_or_default(),
        };
        Ok(Self { cuda_version, num_devices })
    }
}

fn no_driver(answer: String) -> Fault {
    Fault { doing: "use the NVIDIA driver", answer }
}

/// Free and total memory of a GPU in bytes.
///
/// Errors: [`Error::Gpu`] if there is no such GPU.
pub fn memory(ordinal: usize) -> Result<(u64, u64), Error> {
    Driver::probe()?;
    // Alive until the answer: a context that nobody holds knows no memory.
    let ask = || CudaContext::new(ordinal)?.mem_get_info();
    let (free, total) = ask().map_err(driver("read the GPU's memory"))?;
    Ok((free as u64, total as u64))
}

/// What tells a GPU from every other, in this machine's containers too.
///
/// Errors: [`Error::Gpu`] if there is no such GPU.
pub fn uuid(ordinal: usize) -> Result<[u8; 16], Error> {
    Driver::probe()?;
    let uuid = device(ordinal).and_then(result::device::get_uuid).map_err(driver("read the GPU's UUID"))?;
    Ok(uuid.bytes.map(|byte| byte as u8))
}

/// What the maker calls a GPU, such as `NVIDIA H200`.
///
/// Errors: [`Error::Gpu`] if there is no such GPU.
pub fn device_name(ordinal: usize) -> Result<String, Error> {
    Driver::probe()?;
    Ok(device(ordinal).and_then(result::device::get_name).map_err(driver("read the GPU's name"))?)
}

/// A GPU of which something is asked that needs no context: one takes hundreds of megabytes, and another process may allow none.
fn device(ordinal: usize) -> Result<cuda::CUdevice, DriverError> {
    result::init()?;
    result::device::get(c_int::try_from(ordinal).unwrap_or(c_int::MAX))
}

/// The version of the NCCL that this program finds, such as `2.28.9`.
///
/// Errors: [`Error::Gpu`] if it is missing, too old, or lacks a function.
pub fn nccl_version_text() -> Result<String, Error> {
    Ok(version_text(Nccl::open()?.version))
}

/// NCCL's functions. Results are plain integers: a value that an older or newer library knows is no undefined behaviour.
struct Nccl {
    version: c_int,
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    comm_init_rank_config: unsafe extern "C" fn(*mut *mut c_void, c_int, UniqueId, c_int, *const Config) -> c_int,
    comm_get_async_error: unsafe extern "C" fn(*mut c_void, *mut c_int) -> c_int,
    comm_abort: unsafe extern "C" fn(*mut c_void) -> c_int,
    all_reduce: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, *mut c_void, *mut c_void) -> c_int,
    broadcast: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, *mut c_void, *mut c_void) -> c_int,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    get_last_error: unsafe extern "C" fn(*mut c_void) -> *const c_char,
    /// Keeps the functions where they are.
    _library: Library,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([u8; UNIQUE_ID_BYTES]);

/// The configuration as NCCL 2.18 had it, which newer ones read too: they go by its size and version.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl Config {
    fn non_blocking() -> Self {
        const MAGIC: u32 = 0xcafe_beef;
        const UNDEFINED: c_int = c_int::MIN;
        Self {
            size: size_of::<Self>(),
            magic: MAGIC,
            version: OLDEST_NCCL.unsigned_abs(),
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: ptr::null(),
            split_share: UNDEFINED,
        }
    }
}

impl Nccl {
    fn open() -> Result<Self, Fault> {
        // SAFETY: NCCL's initialisers have no preconditions.
        let library = unsafe { Library::new(NCCL_FILE) }.map_err(|error| Fault {
            doing: "open libnccl.so.2",
            answer: format!(
                "{error}; `make setup` puts NCCL beside libtorch on a machine with an NVIDIA driver, elsewhere LD_LIBRARY_PATH must lead to it"
            ),
        })?;
        // SAFETY: NCCL's header declares it so.
        let get_version: unsafe extern "C" fn(*mut c_int) -> c_int = unsafe { function(&library, "ncclGetVersion", 0) }?;
        let mut version = 0;
        // SAFETY: writes one int.
        unsafe { get_version(&mut version) };
        if version < OLDEST_NCCL {
            let (found, needed) = (version_text(version), version_text(OLDEST_NCCL));
            return Err(Fault { doing: "use libnccl.so.2", answer: format!("it is NCCL {found} and {needed} or newer is needed") });
        }
        // SAFETY: each is declared so in NCCL's header since 2.18, up to enums of the size of an int.
        unsafe {
            Ok(Self {
                version,
                get_unique_id: function(&library, "ncclGetUniqueId", version)?,
                comm_init_rank_config: function(&library, "ncclCommInitRankConfig", version)?,
                comm_get_async_error: function(&library, "ncclCommGetAsyncError", version)?,
                comm_abort: function(&library, "ncclCommAbort", version)?,
                all_reduce: function(&library, "ncclAllReduce", version)?,
                broadcast: function(&library, "ncclBroadcast", version)?,
                get_error_string: function(&library, "ncclGetErrorString", version)?,
                get_last_error: function(&library, "ncclGetLastError", version)?,
                _library: library,
            })
        }
    }

    /// Fails unless NCCL says that it has begun or done what it was asked.
    fn check(&self, doing: &'static str, result: c_int) -> Result<(), Fault> {
        if result == SUCCESS || result == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: both return strings that NCCL keeps, or null; the last error needs no communicator.
        let [name, last] = unsafe { [(self.get_error_string)(result), (self.get_last_error)(ptr::null_mut())].map(|text| text_at(text)) };
        Err(Fault { doing, answer: format!("NCCL {}: {name}; {last}", version_text(self.version)) })
    }
}

/// # Safety
/// `T` must be a function pointer of the type that the library's function has.
unsafe fn function<T: Copy>(library: &Library, name: &'static str, version: c_int) -> Result<T, Fault> {
    // SAFETY: the caller vouches for the type.
    let symbol = unsafe { library.get::<T>(name.as_bytes()) };
    symbol.map(|symbol| *symbol).map_err(|error| {
        let version = if version == 0 { "of an unknown version".to_owned() } else { version_text(version) };
        Fault { doing: "use libnccl.so.2", answer: format!("NCCL {version} has no {name}: {error}") }
    })
}

/// # Safety
/// `text` must be null or a C string.
unsafe fn text_at(text: *const c_char) -> String {
    if text.is_null() {
        return "no details".into();
    }
    // SAFETY: the caller vouches for it.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned()
}

fn version_text(version: c_int) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

/// A GPU as NCCL uses it: a stream beside libtorch's, with a buffer. Lives as long as the worker, through all generations.
pub struct NcclDevice {
    nccl: Nccl,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    event: CudaEvent,
    /// What the stream waits for before it touches values that others have made.
    made: CudaEvent,
    buffer: Mutex<Option<CudaSlice<u8>>>,
    uuid: [u8; 16],
}

impl NcclDevice {
    /// Opens the driver's GPU number `ordinal`, the one libtorch knows by the same number.
    ///
    /// Errors: [`Error::Gpu`], naming the file or the version that is missing.
    pub fn open(ordinal: usize) -> Result<Arc<Self>, Error> {
        Driver::probe()?;
        Ok(Arc::new(Self::on(ordinal)?))
    }

    fn on(ordinal: usize) -> Result<Self, Fault> {
        let nccl = Nccl::open()?;
        // The primary context is the one that libtorch uses.
        let context = CudaContext::new(ordinal).map_err(driver("use the GPU"))?;
        // SAFETY: the one buffer is used on the one stream, by one thread at a time.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(driver("make a stream"))?;
        let new_event = || context.new_event(None).map_err(driver("make an event"));
        let (event, made) = (new_event()?, new_event()?);
        let uuid = context.uuid().map_err(driver("read the GPU's UUID"))?.bytes.map(|byte| byte as u8);
        let name = context.name().unwrap_or_default();
        tracing::info!("NCCL {} on GPU {ordinal}, {name}", version_text(nccl.version));
        tracing::info!("for the topology and transports that NCCL chooses: NCCL_DEBUG=INFO");
        Ok(Self { nccl, context, stream, event, made, buffer: Mutex::new(None), uuid })
    }

    /// Whether this process can still use the GPU. After an illegal access or an uncorrectable error of its memory every call fails until
    /// the process is started again.
    ///
    /// Errors: [`Error::Gpu`] with what the driver says.
    pub fn check_health(&self) -> Result<(), Error> {
        self.context.bind_to_thread().map_err(driver("use the GPU any more"))?;
        // SAFETY: the stream is alive. A question that waits for nothing is answered with the error that has stopped the GPU.
        match unsafe { cuda::cuStreamQuery(self.stream.cu_stream()) } {
            CUresult::CUDA_SUCCESS | CUresult::CUDA_ERROR_NOT_READY => Ok(()),
            error => Err(driver("use the GPU any more")(DriverError(error)).into()),
        }
    }

    /// What no other GPU has.
    pub fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    fn buffer(&self) -> MutexGuard<'_, Option<CudaSlice<u8>>> {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `launch` with the buffer's address.
    fn with_buffer(&self, doing: &'static str, launch: impl FnOnce(*mut c_void, *mut c_void) -> c_int) -> Result<(), Fault> {
        self.context.bind_to_thread().map_err(driver(doing))?;
        let mut buffer = self.buffer();
        let Some(buffer) = buffer.as_mut() else { return Err(Fault { doing, answer: "nothing was uploaded".into() }) };
        let (address, _guard) = buffer.device_ptr_mut(&self.stream);
        self.nccl.check(doing, launch(address as *mut c_void, self.stream.cu_stream().cast()))
    }
}

/// Whether the stream that an event was recorded on has passed it.
fn is_past(event: &CudaEvent) -> Result<bool, Fault> {
    // SAFETY: the event is alive. (cudarc's own question takes an error of the device for "not yet".)
    match unsafe { result::event::query(event.cu_event()) } {
        Ok(()) => Ok(true),
        Err(DriverError(CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
        Err(error) => Err(driver("run on the GPU")(error)),
    }
}

/// Names what was tried when the driver refused.
fn driver(doing: &'static str) -> impl FnOnce(DriverError) -> Fault {
    move |error| Fault { doing, answer: error.to_string() }
}

impl Gpu for NcclDevice {
    fn unique_id(&self) -> Result<[u8; UNIQUE_ID_BYTES], Fault> {
        let mut id = UniqueId([0; UNIQUE_ID_BYTES]);
        // SAFETY: writes one id.
        let result = unsafe { (self.nccl.get_unique_id)(&mut id) };
        self.nccl.check("make NCCL's unique id", result)?;
        Ok(id.0)
    }

    fn start(&self, id: &[u8; UNIQUE_ID_BYTES], num_members: u32, member_index: u32) -> Result<Comm, Fault> {
        let doing = "build NCCL's communicator";
        self.context.bind_to_thread().map_err(driver(doing))?;
        let mut comm = ptr::null_mut();
        let (count, index) = (num_members.cast_signed(), member_index.cast_signed());
        // SAFETY: `comm` and the configuration outlive the call; the latter is copied.
        let result = unsafe { (self.nccl.comm_init_rank_config)(&mut comm, count, UniqueId(*id), index, &Config::non_blocking()) };
        if let Err(fault) = self.nccl.check(doing, result) {
            if !comm.is_null() {
                // SAFETY: nobody else has seen it. What it says does not matter: it has failed already.
                unsafe { (self.nccl.comm_abort)(comm) };
            }
            return Err(fault);
        }
        Ok(Comm(comm as usize))
    }

    fn progress(&self, comm: Comm) -> Result<Progress, Fault> {
        let mut state = SUCCESS;
        // SAFETY: the communicator is alive: the engine forgets it before it is aborted.
        let result = unsafe { (self.nccl.comm_get_async_error)(comm.0 as *mut c_void, &mut state) };
        self.nccl.check("ask NCCL for errors", result)?;
        self.nccl.check("go on in NCCL", state)?;
        Ok(if state == IN_PROGRESS { Progress::Busy } else { Progress::Idle })
    }

    fn upload(&self, bytes: &[u8]) -> Result<(), Fault> {
        let doing = "copy to the GPU";
        self.reserve(bytes.len())?;
        let mut buffer = self.buffer();
        let Some(buffer) = buffer.as_mut() else { return Ok(()) };
        let mut start = buffer.slice_mut(..bytes.len());
        self.stream.memcpy_htod(bytes, &mut start).map_err(driver(doing))
    }

    fn reserve(&self, num_bytes: usize) -> Result<(), Fault> {
        let mut buffer = self.buffer();
        if buffer.as_ref().is_none_or(|buffer| buffer.len() < num_bytes) {
            // The old one goes first: both together may be more than is free.
            *buffer = None;
            *buffer = Some(self.stream.alloc_zeros::<u8>(num_bytes).map_err(driver("allocate on the GPU"))?);
        }
        Ok(())
    }

    fn all_reduce(&self, comm: Comm, num_values: usize) -> Result<(), Fault> {
        let (float, sum) = (ncclDataType_t::ncclFloat32 as c_int, ncclRedOp_t::ncclSum as c_int);
        self.with_buffer("launch an all-reduce", |address, stream| {
            // SAFETY: the buffer holds that many values and is not freed before the stream is past them.
            unsafe { (self.nccl.all_reduce)(address, address, num_values, float, sum, comm.0 as *mut c_void, stream) }
        })
    }

    fn all_reduce_in_place(&self, comm: Comm, values: DeviceValues) -> Result<(), Fault> {
        let doing = "launch an all-reduce";
        let DeviceValues { address, num_values, stream } = values;
        self.context.bind_to_thread().map_err(driver(doing))?;
        let (float, sum) = (ncclDataType_t::ncclFloat32 as c_int, ncclRedOp_t::ncclSum as c_int);
        // SAFETY: whoever made the values has promised that the stream is one of this GPU, and that they lie there until the engine
        // returns, which it does when this stream is past them, or when the communicator is aborted and its kernels are gone.
        let result = unsafe {
            result::event::record(self.made.cu_event(), stream as CUstream).map_err(driver(doing))?;
            result::stream::wait_event(self.stream.cu_stream(), self.made.cu_event(), CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT)
                .map_err(driver(doing))?;
            let address = address as *mut c_void;
            (self.nccl.all_reduce)(address, address, num_values, float, sum, comm.0 as *mut c_void, self.stream.cu_stream().cast())
        };
        self.nccl.check(doing, result)
    }

    fn has_come_to_sum(&self) -> Result<bool, Fault> {
        is_past(&self.made)
    }

    fn broadcast(&self, comm: Comm, num_bytes: usize, root: u32) -> Result<(), Fault> {
        let byte = ncclDataType_t::ncclUint8 as c_int;
        self.with_buffer("launch a broadcast", |address, stream| {
            // SAFETY: the buffer holds that many bytes and is not freed before the stream is past them.
            unsafe { (self.nccl.broadcast)(address, address, num_bytes, byte, root.cast_signed(), comm.0 as *mut c_void, stream) }
        })
    }

    fn mark(&self) -> Result<(), Fault> {
        self.event.record(&self.stream).map_err(driver("record an event"))
    }

    fn is_past_mark(&self) -> Result<bool, Fault> {
        is_past(&self.event)
    }

    fn download(&self, bytes: &mut [u8]) -> Result<(), Fault> {
        let doing = "copy from the GPU";
        let buffer = self.buffer();
        let Some(buffer) = buffer.as_ref() else { return Err(Fault { doing, answer: "nothing was uploaded".into() }) };
        self.stream.memcpy_dtoh(&buffer.slice(..bytes.len()), bytes).map_err(driver(doing))?;
        self.stream.synchronize().map_err(driver(doing))
    }

    fn trim(&self, num_bytes: usize) -> Result<(), Fault> {
        self.context.bind_to_thread().map_err(driver("free on the GPU"))?;
        let freed = self.buffer().take_if(|buffer| buffer.len() > num_bytes).map(drop);
        // What is freed on a stream is the GPU's again once somebody has waited for that.
        freed.map_or(Ok(()), |()| self.stream.synchronize().map_err(driver("free on the GPU")))
    }

    fn abort(&self, comm: Comm) -> Result<(), Fault> {
        let doing = "abort NCCL's communicator";
        self.context.bind_to_thread().map_err(driver(doing))?;
        // SAFETY: the engine gives each communicator here once and uses it no more.
        let result = unsafe { (self.nccl.comm_abort)(comm.0 as *mut c_void) };
        self.nccl.check(doing, result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_has_the_layout_of_nccl_2_18() {
        assert_eq!((size_of::<Config>(), std::mem::offset_of!(Config, net_name)), (48, 32));
        assert_eq!((Config::non_blocking().size, Config::non_blocking().version), (48, 21_800));
    }

    #[test]
    fn versions_are_told_as_people_know_them() {
        assert_eq!([21_800, 22_809].map(version_text), ["2.18.0", "2.28.9"]);
    }

    /// Runs the part of the library that needs no GPU where it is installed; elsewhere the error is what is tested.
    #[test]
    fn nccl_is_opened_or_its_file_is_named() {
        match nccl_version_text() {
            Ok(version) => assert!(version.starts_with("2."), "{version}"),
            Err(error) => assert!(error.to_string().starts_with("cannot open libnccl.so.2: "), "{error}"),
        }
    }

    #[test]
    fn a_machine_without_a_driver_is_told_which_file_is_missing() {
        if let Err(error) = Driver::probe() {
            let text = error.to_string();
            assert!(text.starts_with("cannot use the NVIDIA driver: "), "{text}");
        }
    }
}
