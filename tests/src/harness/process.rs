//! A child process whose lines can be waited for.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use super::{PATIENCE, POLL, programs};

/// How the tracing format marks a line that says that something went wrong.
const ERROR_MARK: &str = " ERROR ";
/// Exit code of an orderly end after Ctrl-C.
const AFTER_INTERRUPT: i32 = 130;
/// Exit code of an orderly end after SIGTERM.
const AFTER_TERMINATE: i32 = 143;
/// How long the pipes of a process that has ended may stay open: a child of its own may hold them for a moment.
const PIPES_TIMEOUT: Duration = Duration::from_secs(5);

/// A running program. Killed on drop; its output is printed when that happens in a failing test.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    output: Arc<Output>,
    allowed_errors: Vec<String>,
}

/// What a process printed so far, stdout and stderr as they came.
#[derive(Debug)]
struct Output {
    state: Mutex<OutputState>,
    changed: Condvar,
    started: Instant,
}

#[derive(Debug)]
struct OutputState {
    lines: Vec<(Duration, String)>,
    num_open_pipes: usize,
}

impl Output {
    fn state(&self) -> MutexGuard<'_, OutputState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn follow(self: &Arc<Self>, pipe: impl Read + Send + 'static) {
        let output = self.clone();
        std::thread::spawn(move || {
            let mut lines = BufReader::new(pipe);
            let mut line = Vec::new();
            while matches!(lines.read_until(b'\n', &mut line), Ok(length) if length > 0) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                output.state().lines.push((output.started.elapsed(), text));
                output.changed.notify_all();
                line.clear();
            }
            output.state().num_open_pipes -= 1;
            output.changed.notify_all();
        });
    }

    /// Waits until `look` finds something in the lines, the pipes are closed, or time is up.
    fn wait<T>(&self, timeout: Duration, mut look: impl FnMut(&OutputState) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + timeout;
        let mut state = self.state();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let found = look(&state);
            if found.is_some() || left.is_zero() || state.num_open_pipes == 0 {
                return found;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Process {
    /// Starts one of this workspace's programs in the workspace's root.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start(name: &str, program: &str, arguments: &[&str]) -> Self {
        Self::start_with(name, program, arguments, &[])
    }

    /// As [`Process::start`], with variables in its environment.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start_with(name: &str, program: &str, arguments: &[&str], environment: &[(&str, String)]) -> Self {
        let mut command = Command::new(programs::program(program));
        command.args(arguments).current_dir(programs::workspace()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Stories run beside each other: thread pools that spin while they wait would take the cores from those that work.
        command.env("OMP_NUM_THREADS", "1").env("OMP_WAIT_POLICY", "PASSIVE").env("RUST_BACKTRACE", "1");
        // A path that a story means to be missing may be a model's name.
        command.env("HF_HUB_OFFLINE", "1");
        for variable in ["PEAPOD_COORDINATOR", "PEAPOD_RANK", "PEAPOD_FAULTS", "RUST_LOG"] {
            command.env_remove(variable);
        }
        command.envs(environment.iter().map(|(variable, value)| (variable, value)));
        // As from a terminal, also where the tests run under nohup.
        // SAFETY: between fork and exec this is a system call and nothing else.
        unsafe {
            command.pre_exec(|| {
                libc::signal(libc::SIGHUP, libc::SIG_DFL);
                Ok(())
            });
        }
        let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot start {program}: {error}"));
        let state = OutputState { lines: Vec::new(), num_open_pipes: 2 };
        let output = Arc::new(Output { state: Mutex::new(state), changed: Condvar::new(), started: Instant::now() });
        output.follow(child.stdout.take().expect("stdout is piped"));
        output.follow(child.stderr.take().expect("stderr is piped"));
        Self { name: name.to_owned(), child, output, allowed_errors: Vec::new() }
    }

    /// The process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// All lines so far.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.output.state().lines.iter().map(|(_, line)| line.clone()).collect()
    }

    /// The lines so far that contain `text`.
    #[must_use]
    pub fn lines_with(&self, text: &str) -> Vec<String> {
        self.lines().into_iter().filter(|line| line.contains(text)).collect()
    }

    /// Waits for a line that contains `text` and returns the first one.
    ///
    /// # Panics
    /// If the process ends without it, or [`PATIENCE`] does.
    pub fn wait_for(&self, text: &str) -> String {
        self.wait_for_times(text, 1)
    }

    /// Waits until `times` lines contain `text` and returns the last of them.
    ///
    /// # Panics
    /// If the process ends without them, or [`PATIENCE`] does.
    pub fn wait_for_times(&self, text: &str, times: usize) -> String {
        let look =
            |state: &OutputState| state.lines.iter().filter(|(_, line)| line.contains(text)).nth(times - 1).map(|(_, line)| line.clone());
        self.output.wait(PATIENCE, look).unwrap_or_else(|| panic!("{} never said \"{text}\" {times} times", self.name))
    }

    /// Fails unless a line contains `text`.
    ///
    /// # Panics
    /// If none does.
    #[track_caller]
    pub fn assert_said(&self, text: &str) {
        assert!(!self.lines_with(text).is_empty(), "{} did not say \"{text}\"", self.name);
    }

    /// Lets lines with this text say ERROR without failing the story.
    pub fn allow_error(&mut self, text: &str) {
        self.allowed_errors.push(text.to_owned());
    }

    /// Sends a signal.
    ///
    /// # Panics
    /// If the process is gone.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        kill_process(pid(self.id()), signal).unwrap_or_else(|error| panic!("{}: cannot send {signal:?}: {error}", self.name));
    }

    /// Whether the process has not ended yet.
    ///
    /// # Panics
    /// If the system does not say.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("the state of a child").is_none()
    }

    /// Waits for the end, with all lines read.
    ///
    /// # Panics
    /// After [`PATIENCE`].
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let started = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("the state of a child") {
                break status;
            }
            assert!(started.elapsed() < PATIENCE, "{} did not end within {PATIENCE:?}", self.name);
            std::thread::sleep(POLL);
        };
        self.output.wait(PIPES_TIMEOUT, |_| None::<()>);
        status
    }

    /// Waits for the end and checks the exit code. A process that ends well, or as asked by a signal, must have had nothing to say with
    /// ERROR, unless allowed.
    ///
    /// # Panics
    /// If the code is another one, or an unexpected ERROR was said.
    #[track_caller]
    pub fn expect_exit(&mut self, code: i32) {
        let status = self.wait();
        assert_eq!(status.code(), Some(code), "{} ended with {status}", self.name);
        if matches!(code, 0 | AFTER_INTERRUPT | AFTER_TERMINATE) {
            let unexpected = |line: &String| !self.allowed_errors.iter().any(|allowed| line.contains(allowed));
            let errors: Vec<String> = self.lines_with(ERROR_MARK).into_iter().filter(unexpected).collect();
            assert!(errors.is_empty(), "{} ended with {code} but said: {errors:#?}", self.name);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended cannot be killed, which is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- output of {} (pid {})", self.name, self.child.id());
            for (at, line) in &self.output.state().lines {
                eprintln!("{:7.3} {line}", at.as_secs_f64());
            }
        }
    }
}

fn pid(id: u32) -> Pid {
    i32::try_from(id).ok().and_then(Pid::from_raw).expect("a process id")
}

/// Kills a process that need not be a child of this one.
///
/// # Panics
/// If it is gone.
#[track_caller]
pub fn kill(id: u32) {
    kill_process(pid(id), Signal::KILL).unwrap_or_else(|error| panic!("cannot kill process {id}: {error}"));
}

/// Whether a process lives that need not be a child of this one. One that has ended and waits for its parent to ask does not.
#[must_use]
pub fn is_alive(id: u32) -> bool {
    let is_zombie = || {
        let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, state)| state.starts_with('Z'))
    };
    test_kill_process(pid(id)).is_ok() && !is_zombie()
}
