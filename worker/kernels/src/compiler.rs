//! NVRTC, the compiler of CUDA, as it comes with libtorch.
//!
//! It is opened by its path: by its name alone the system may know another toolkit's, and cuDNN, which compiles some of its own kernels and
//! asks for it by name, finds one that is open already.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use crate::Error;
use crate::error::Result;

/// What NVRTC opens by name, and NVRTC: how the files begin.
const FILES: [&str; 2] = ["libnvrtc-builtins.so.", "libnvrtc.so."];
/// How the loader knows them, of the CUDA that this program's libtorch is built with.
const NAMES: [&str; 2] = ["libnvrtc-builtins.so.13.0", "libnvrtc.so.13"];

type Program = *mut c_void;
type ReadSize = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Read = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

/// Functions of nvrtc.h. All but the last answer 0, or with the number of an error.
struct Functions {
    create: unsafe extern "C" fn(*mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    log: (ReadSize, Read),
    image: (ReadSize, Read),
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    describe: unsafe extern "C" fn(c_int) -> *const c_char,
}

/// Opens NVRTC for whoever asks for it by name later, such as cuDNN. It stays open until the process ends.
///
/// # Errors
/// [`Error::Gpu`] if it is neither beside libtorch nor where the system looks.
pub fn open_compiler() -> Result<()> {
    library().map(|_| ())
}

fn library() -> Result<&'static Library> {
    static LIBRARY: OnceLock<Option<Library>> = OnceLock::new();
    let answer = "libnvrtc.so.13 is not on this machine: it comes with libtorch where a driver is";
    LIBRARY.get_or_init(open).as_ref().ok_or_else(|| failed(answer.into()))
}

/// From where the wheels put it, beside libtorch, wherever that is; else from where the system looks, which is where the images have it.
fn open() -> Option<Library> {
    let mut files: Vec<PathBuf> = folder_of_libtorch()
        .and_then(|folder| std::fs::read_dir(folder.join("../../nvidia/cu13/lib")).ok())
        .map(|entries| entries.filter_map(|entry| Some(entry.ok()?.path())).collect())
        .unwrap_or_default();
    files.sort();
    let mut opened = None;
    for (start, name) in FILES.into_iter().zip(NAMES) {
        let is_wanted = |file: &&PathBuf| file.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(start));
        let beside = files.iter().rev().filter(is_wanted).map(PathBuf::as_path);
        // SAFETY: the vendor's library, whose initialisers have no preconditions.
        let library = beside.chain([Path::new(name)]).find_map(|file| unsafe { Library::open(Some(file), RTLD_NOW | RTLD_GLOBAL) }.ok());
        // What was opened first stays open; the last is NVRTC itself.
        std::mem::forget(std::mem::replace(&mut opened, library));
    }
    opened
}

/// The folder that libtorch was loaded from.
fn folder_of_libtorch() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    // Address, rights, offset, device and inode stand before the path.
    let paths = maps.lines().filter_map(|line| line.split_once('/').map(|(_, path)| format!("/{path}")));
    paths.map(PathBuf::from).find(|path| path.ends_with("libtorch_cpu.so"))?.parent().map(Path::to_path_buf)
}

fn failed(answer: String) -> Error {
    Error::Gpu { doing: "compile kernels", answer }
}

/// Compiles a source to the image that a GPU loads. Needs no GPU.
///
/// # Errors
/// [`Error::Gpu`] if there is no NVRTC, or with its messages.
pub(crate) fn compile(source: &CStr, options: &[CString]) -> Result<Vec<u8>> {
    let functions = Functions::of(library()?)?;
    let mut program = ptr::null_mut();
    // SAFETY: texts with their ends, no headers, and room for a program.
    functions.check(unsafe { (functions.create)(&mut program, source.as_ptr(), c"peapod.cu".as_ptr(), 0, ptr::null(), ptr::null()) })?;
    // SAFETY: the program was made above, and is destroyed once, after its last use.
    unsafe {
        let made = functions.make(program, options);
        (functions.destroy)(&mut program);
        made
    }
}

impl Functions {
    fn of(library: &Library) -> Result<Self> {
        // SAFETY: functions of these names have the types that nvrtc.h gives them, which are those of the fields.
        unsafe {
            Ok(Self {
                create: function(library, "nvrtcCreateProgram")?,
                compile: function(library, "nvrtcCompileProgram")?,
                log: (function(library, "nvrtcGetProgramLogSize")?, function(library, "nvrtcGetProgramLog")?),
                image: (function(library, "nvrtcGetCUBINSize")?, function(library, "nvrtcGetCUBIN")?),
                destroy: function(library, "nvrtcDestroyProgram")?,
                describe: function(library, "nvrtcGetErrorString")?,
            })
        }
    }

    /// # Safety
    /// `program` is one.
    unsafe fn make(&self, program: Program, options: &[CString]) -> Result<Vec<u8>> {
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: the caller's promise, and as many texts as it is told. What was compiled has an image, and has a log in any case.
        unsafe {
            let code = (self.compile)(program, options.len() as c_int, options.as_ptr());
            self.check(code).map_err(|error| match self.read(self.log, program) {
                Ok(log) if log.iter().any(|byte| byte.is_ascii_graphic()) => failed(text(&log)),
                _ => error,
            })?;
            self.read(self.image, program)
        }
    }

    /// # Safety
    /// `program` is one that has been compiled, and the functions are two of those that tell a size and fill as many bytes.
    unsafe fn read(&self, (size, fill): (ReadSize, Read), program: Program) -> Result<Vec<u8>> {
        let mut length = 0;
        // SAFETY: the caller's promise; then room for as many bytes as it says.
        unsafe {
            self.check(size(program, &mut length))?;
            let mut bytes = vec![0_u8; length];
            self.check(fill(program, bytes.as_mut_ptr().cast()))?;
            Ok(bytes)
        }
    }

    fn check(&self, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: answers every number with a text of its own.
        Err(failed(unsafe { CStr::from_ptr((self.describe)(code)) }.to_string_lossy().into_owned()))
    }
}

/// # Safety
/// `F` is the type of the function of this name.
unsafe fn function<F: Copy>(library: &Library, name: &str) -> Result<F> {
    // SAFETY: the caller's promise.
    unsafe { library.get::<F>(name.as_bytes()) }.map(|symbol| *symbol).map_err(|error| failed(error.to_string()))
}

/// What stands before the end of a text.
fn text(bytes: &[u8]) -> String {
    let text = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtorch_is_found_where_it_was_loaded_from() {
        let folder = folder_of_libtorch().unwrap();
        assert!(folder.join("libc10.so").is_file(), "{}", folder.display());
    }

    /// cuDNN finds NVRTC by its name once it is open, and so does NVRTC what it opens itself.
    #[test]
    fn compiler_is_known_by_name_once_it_is_open() {
        if let Err(error) = open_compiler() {
            eprintln!("skipped: {error}");
            return;
        }
        const RTLD_NOLOAD: c_int = 4;
        for name in NAMES {
            // SAFETY: nothing is loaded that is not loaded already.
            assert!(unsafe { Library::open(Some(name), RTLD_NOW | RTLD_NOLOAD) }.is_ok(), "{name}");
        }
    }

    #[test]
    fn what_the_compiler_says_is_told() {
        let options = [c"--gpu-architecture=sm_90".to_owned()];
        match compile(c"int broken(", &options) {
            Err(error) if open_compiler().is_ok() => assert!(error.to_string().contains("peapod.cu(1): error"), "{error}"),
            Err(error) => assert!(error.to_string().contains("libnvrtc.so.13 is not on this machine"), "{error}"),
            Ok(_) => panic!("compiled what is broken"),
        }
    }
}
