//! `--local`: the workers as child processes of the coordinator, on one machine.

use std::collections::VecDeque;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use peapod_proto::program::counted;
use peapod_proto::secure::JoinString;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::process::{Child, Command as Program};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tracing::Level;

use peapod_proto::ids::Step;

use crate::core::{Event, Process};
use crate::driver::Command;
use crate::oom::OutOfMemory;

/// How the children are started.
#[derive(Debug, Clone)]
pub struct Local {
    /// The `worker` program.
    pub program: PathBuf,
    /// Number of workers.
    pub world_size: u32,
    /// Number of workers that are enough.
    pub min_world_size: u32,
    /// Address they join.
    pub coordinator: String,
    /// What they are let in with, where that is needed.
    pub join: Option<JoinString>,
    /// This machine's name, as workers say it.
    pub host: String,
    /// How often dead ones are started again, all together, between two checkpoints.
    pub max_restarts: u32,
}

/// How long a child may take to hear from the coordinator that the job is over.
const HEARSAY: Duration = Duration::from_secs(1);
/// A child that is told to stop gets this long before it is killed.
const GRACE: Duration = Duration::from_secs(10);
/// How long the lines of a child that has ended may take to be read.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// A line of a worker that is longer is forwarded in pieces.
const MAX_LINE_BYTES: u64 = 64 << 10;
/// Lines of a worker that are kept to explain its end.
const KEPT_LINES: usize = 12;
/// Exit code of a worker whose arguments or job are wrong: another start would end the same way.
const BAD_ARGUMENTS: i32 = 2;
/// Exit codes of a worker that a signal sent away, and that left in order.
const SENT_AWAY: [i32; 3] = [129, 130, 143];

impl Local {
    /// Finds the `worker` program beside this one, or in PATH.
    #[must_use]
    pub fn find_program() -> PathBuf {
        let beside = std::env::current_exe().ok().and_then(|own| Some(own.parent()?.join("worker")));
        beside.filter(|path| path.is_file()).unwrap_or_else(|| PathBuf::from("worker"))
    }

    /// Runs the workers until `over` turns true, then waits for them.
    ///
    /// A worker that dies is started again while the budget lasts. A checkpoint fills it up: what has been reached since the last restart
    /// is safe. With no restart left the job goes on without the worker if enough are left, and is given up otherwise.
    ///
    /// # Errors
    /// If the first workers cannot be started.
    pub async fn run(self, commands: mpsc::Sender<Command>, mut over: watch::Receiver<bool>) -> std::io::Result<()> {
        let mut children = JoinSet::new();
        for rank in 0..self.world_size {
            self.start(rank, &mut children, over.clone())?;
        }
        let mut budget = Budget { max: self.max_restarts, used: 0, checkpoint: None };
        loop {
            let ended = tokio::select! {
                ended = children.join_next() => ended,
                _ = over.wait_for(|&over| over) => break,
            };
            let Some(Ok(Ended { rank, pid, status, log, out_of_memory })) = ended else { break };
            if *over.borrow() {
                break;
            }
            let cause = match &status {
                Ok(status) => describe(*status, out_of_memory),
                Err(error) => format!("cannot be waited for: {error}"),
            };
            let said = log.last().map_or_else(String::new, |line| format!(" ({line})"));
            let is_final = |code| code == BAD_ARGUMENTS || SENT_AWAY.contains(&code);
            if status.is_ok_and(|status| status.success() || status.code().is_some_and(is_final)) {
                // Left on request, or refused: neither is cured by another start.
                tracing::info!("worker of rank {rank} {cause}");
                if children.len() < self.min_world_size as usize {
                    let (left, min) = (children.len(), self.min_world_size);
                    let reason = format!("worker of rank {rank} {cause}{said}: workers left: {left}, needed: {min}, and none is to come");
                    let _ = commands.send(Command::Tell(Event::GiveUp { reason })).await;
                }
                continue;
            }
            let process = Process { host: self.host.clone(), pid };
            let _ = commands.send(Command::Tell(Event::Exited { process, cause: cause.clone(), log })).await;
            let why = if budget.take(newest_checkpoint(&commands).await) {
                let (used, max) = (budget.used, budget.max);
                tracing::warn!("worker of rank {rank} {cause}; starting it again (restart {used} of {max} since the newest checkpoint)");
                match self.start(rank, &mut children, over.clone()) {
                    Ok(()) => continue,
                    Err(error) => error.to_string(),
                }
            } else {
                format!("no restart is left (--max-restarts {})", self.max_restarts)
            };
            let left = children.len();
            if left >= self.min_world_size as usize {
                tracing::error!("worker of rank {rank} {cause}, and {why}: going on with {}", counted(left, "other worker"));
            } else {
                // The others keep what they hold until the job is over.
                let reason = format!("worker of rank {rank} {cause}{said}, and {why}");
                let _ = commands.send(Command::Tell(Event::GiveUp { reason })).await;
            }
        }
        while children.join_next().await.is_some() {}
        Ok(())
    }

    fn start(&self, rank: u32, children: &mut JoinSet<Ended>, over: watch::Receiver<bool>) -> std::io::Result<()> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        // Workers whose thread pools overlap spin against each other.
        let threads = (cores / self.world_size as usize).max(1);
        let mut process = Program::new(&self.program);
        process
            .args(["--rank", &rank.to_string(), "--coordinator", &self.coordinator, "--threads", &threads.to_string(), "--quiet"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C is for the coordinator, which ends the job in order.
            .process_group(0)
            // Idle threads of a pool sleep instead of spinning on cores that another worker needs. libgomp reads it as it is loaded.
            .env("OMP_WAIT_POLICY", "PASSIVE")
            // Each takes a GPU of its own, where there are any.
            .env("PEAPOD_LOCAL_RANK", rank.to_string())
            .kill_on_drop(true);
        // These are the coordinator's own, should its environment have any; and arguments could be read by other users. Workers' lines go
        // into the coordinator's, which are for machines already where that is asked for.
        for variable in ["PEAPOD_TLS_CERT", "PEAPOD_TLS_KEY", "PEAPOD_TLS_CA", "PEAPOD_TOKEN_FILE", "PEAPOD_JOIN", "PEAPOD_LOG_FORMAT"] {
            process.env_remove(variable);
        }
        if let Some(join) = &self.join {
            process.env("PEAPOD_JOIN", join.reveal());
        }
        die_with_parent(&mut process);
        let mut child = process.spawn().map_err(|error| {
            std::io::Error::new(error.kind(), format!("cannot start {}: {error}; build it with `cargo build`", self.program.display()))
        })?;
        let pid = child.id().unwrap_or_default();
        let log = Log::default();
        let mut forwarded = JoinSet::new();
        forward(rank, child.stdout.take(), &log, &mut forwarded);
        forward(rank, child.stderr.take(), &log, &mut forwarded);
        let memory = OutOfMemory::now();
        children.spawn(async move {
            let status = wait(child, over).await;
            // Its last words, which say why it ended, may still be in the pipes; a child of its own would keep them open for longer.
            let _ = tokio::time::timeout(LAST_WORDS, async { while forwarded.join_next().await.is_some() {} }).await;
            forwarded.detach_all();
            let killed = status.as_ref().is_ok_and(|status| status.signal() == Some(libc::SIGKILL));
            Ended { rank, pid, status, log: log.take(), out_of_memory: killed.then(|| memory.since()).flatten() }
        });
        Ok(())
    }
}

/// The end of a child.
struct Ended {
    rank: u32,
    pid: u32,
    status: std::io::Result<ExitStatus>,
    /// What it wrote last.
    log: Vec<String>,
    /// The kernel's word that memory ran out, if it gave one.
    out_of_memory: Option<String>,
}

/// How many restarts are left.
#[derive(Debug)]
struct Budget {
    max: u32,
    used: u32,
    /// The newest checkpoint at the last restart.
    checkpoint: Option<Step>,
}

impl Budget {
    /// Takes a restart, if one is left. A checkpoint that was not there at the last one fills the budget up first.
    fn take(&mut self, newest: Option<Step>) -> bool {
        if newest > self.checkpoint {
            (self.used, self.checkpoint) = (0, newest);
        }
        let is_left = self.used < self.max;
        self.used += u32::from(is_left);
        is_left
    }
}

/// Step of the newest whole checkpoint; none if there is none, or the driver is gone.
async fn newest_checkpoint(commands: &mpsc::Sender<Command>) -> Option<Step> {
    let (reply, status) = oneshot::channel();
    commands.send(Command::Status { reply }).await.ok()?;
    status.await.ok()?.checkpoint_step
}

/// The last lines of a child, from both of its pipes.
#[derive(Debug, Clone, Default)]
struct Log(Arc<Mutex<VecDeque<String>>>);

impl Log {
    fn push(&self, line: &str) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == KEPT_LINES {
            lines.pop_front();
        }
        lines.push_back(line.to_owned());
    }

    fn take(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).drain(..).collect()
    }
}

/// Waits for a child. One that is not told of the job's end, as it has not joined yet, hears a signal; one that outlives the job by far is
/// killed.
async fn wait(mut child: Child, mut over: watch::Receiver<bool>) -> std::io::Result<ExitStatus> {
    tokio::select! {
        status = child.wait() => return status,
        _ = over.wait_for(|&over| over) => {}
    }
    if let Ok(status) = tokio::time::timeout(HEARSAY, child.wait()).await {
        return status;
    }
    if let Some(pid) = child.id().and_then(|id| rustix::process::Pid::from_raw(id.cast_signed())) {
        // It is not waited for yet, so that the number is still its own.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    match tokio::time::timeout(GRACE, child.wait()).await {
        Ok(status) => status,
        Err(_) => {
            child.kill().await?;
            child.wait().await
        }
    }
}

/// Leaves no orphan when the coordinator is killed. (The kernel means the thread that has started the child: it is one of the runtime's,
/// which live as long as the process.)
#[expect(unsafe_code, reason = "what runs between fork and exec is for the caller to vouch for")]
fn die_with_parent(process: &mut Program) {
    let coordinator = rustix::process::getpid();
    // SAFETY: both are system calls alone, which may be made there and touch no memory of this process.
    unsafe {
        process.pre_exec(move || {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            // It may have died before the kernel was told.
            if rustix::process::getppid() == Some(coordinator) { Ok(()) } else { Err(std::io::ErrorKind::NotConnected.into()) }
        });
    }
}

/// Repeats a child's lines with its rank before them, until the pipe ends.
fn forward(rank: u32, pipe: Option<impl AsyncRead + Unpin + Send + 'static>, log: &Log, tasks: &mut JoinSet<()>) {
    let Some(pipe) = pipe else { return };
    let log = log.clone();
    tasks.spawn(async move {
        let mut pipe = BufReader::new(pipe);
        while let Some(line) = next_line(&mut pipe).await {
            match told(&line) {
                (Level::ERROR, text) => tracing::error!(target: "worker", "[{rank}] {text}"),
                (Level::WARN, text) => tracing::warn!(target: "worker", "[{rank}] {text}"),
                (_, text) => tracing::info!(target: "worker", "[{rank}] {text}"),
            }
            log.push(&line);
        }
    });
}

/// What a child's line says, and how serious that is: the coordinator's own line has a time.
fn told(line: &str) -> (Level, &str) {
    let of_log = || {
        let (time, rest) = line.split_once(' ')?;
        let (level, text) = rest.trim_start().split_once(' ')?;
        let is_time = time.len() > 20 && time.ends_with('Z') && time.contains('T');
        Some((level.parse().ok()?, text)).filter(|_| is_time)
    };
    of_log().unwrap_or((Level::INFO, line))
}

/// The next line of a child, whatever bytes are in it; one that is too long comes in pieces.
async fn next_line(pipe: &mut (impl AsyncBufReadExt + Unpin)) -> Option<String> {
    let mut line = Vec::new();
    match pipe.take(MAX_LINE_BYTES).read_until(b'\n', &mut line).await {
        Ok(0) | Err(_) => None,
        Ok(_) => Some(String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']).to_owned()),
    }
}

fn describe(status: ExitStatus, out_of_memory: Option<String>) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with code {code}"),
        (None, Some(libc::SIGKILL)) if let Some(word) = out_of_memory => format!("was killed because memory ran out ({word})"),
        (None, Some(signal)) => format!("was killed by signal {signal}{}", signal_name(signal)),
        (None, None) => "ended".into(),
    }
}

fn signal_name(signal: i32) -> &'static str {
    match signal {
        libc::SIGKILL => " (SIGKILL)",
        libc::SIGSEGV => " (SIGSEGV)",
        libc::SIGBUS => " (SIGBUS; often /dev/shm is full)",
        libc::SIGILL => " (SIGILL; the program was built for another processor)",
        libc::SIGABRT => " (SIGABRT)",
        libc::SIGTERM => " (SIGTERM)",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restarts_are_filled_up_by_a_checkpoint_and_by_nothing_else() {
        let mut budget = Budget { max: 2, used: 0, checkpoint: None };
        assert!(budget.take(None) && budget.take(None) && !budget.take(None));
        assert!(budget.take(Some(Step(100))), "a checkpoint was stored meanwhile");
        assert!(budget.take(Some(Step(100))) && !budget.take(Some(Step(100))));
        assert!(budget.take(Some(Step(200))));
        let mut none = Budget { max: 0, used: 0, checkpoint: None };
        assert!(!none.take(None) && !none.take(Some(Step(1))));
    }

    #[test]
    fn lines_of_a_childs_log_keep_their_level_and_lose_their_time() {
        assert_eq!(told("2026-11-30T13:54:20.536891Z  WARN slow disk"), (Level::WARN, "slow disk"));
        assert_eq!(told("2026-11-30T13:54:20.536891Z  INFO  two"), (Level::INFO, " two"));
        for other in ["worker: the job ended", "2026-11-30T13:54:20.536891Z", "NCCL INFO Z", "", "2026-11-30T13:54:20.536891Z OTHER x"] {
            assert_eq!(told(other), (Level::INFO, other));
        }
    }

    #[test]
    fn end_of_a_process_is_told_by_its_name() {
        let signal = |signal| ExitStatus::from_raw(signal);
        assert_eq!(describe(signal(9), None), "was killed by signal 9 (SIGKILL)");
        let word = "oom_kill 3 in memory.events".to_owned();
        assert_eq!(describe(signal(9), Some(word)), "was killed because memory ran out (oom_kill 3 in memory.events)");
        assert_eq!(describe(signal(101 << 8), None), "exited with code 101");
    }

    /// A program that is gone when it is needed again, as after an update.
    #[tokio::test]
    async fn restart_that_fails_leaves_the_other_workers_alone() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("worker");
        // Its fourth argument is the coordinator: a file that rank 0 makes once it is there.
        let there = folder.path().join("there");
        let script = "#!/bin/sh\nif [ $2 = 0 ]; then : > $4; exec sleep 60; fi\nwhile [ ! -e $4 ]; do sleep 0.01; done\nrm $0\nexit 1\n";
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let coordinator = there.display().to_string();
        let local = Local { program, world_size: 2, min_world_size: 1, coordinator, join: None, host: "host".into(), max_restarts: 3 };
        let (commands, mut inbox) = mpsc::channel(16);
        let (over, is_over) = watch::channel(false);
        let running = tokio::spawn(local.run(commands, is_over));
        let Some(Command::Tell(Event::Exited { cause, .. })) = inbox.recv().await else { panic!() };
        assert_eq!(cause, "exited with code 1");
        // Nobody knows of a checkpoint: the question's other end is dropped.
        assert!(matches!(inbox.recv().await, Some(Command::Status { .. })));
        let next = tokio::time::timeout(Duration::from_millis(300), inbox.recv()).await;
        assert!(next.is_err() && !running.is_finished(), "the other one trains on: {next:?}");
        running.abort();
        drop(over);
    }

    #[tokio::test]
    async fn lines_of_any_bytes_and_length_are_forwarded() {
        let long = [b'x'; MAX_LINE_BYTES as usize + 3];
        let bytes = [&b"one\r\n\xff\xfetwo\n"[..], &long, b"\nend"].concat();
        let mut pipe = BufReader::new(&bytes[..]);
        let mut lines = Vec::new();
        while let Some(line) = next_line(&mut pipe).await {
            lines.push(line);
        }
        assert_eq!(lines[..2], ["one", "\u{fffd}\u{fffd}two"]);
        assert_eq!(lines[2..].iter().map(String::len).collect::<Vec<_>>(), [MAX_LINE_BYTES as usize, 3, 3]);
    }

    #[test]
    fn last_lines_are_kept_and_no_more() {
        let log = Log::default();
        (0..KEPT_LINES + 5).for_each(|line| log.push(&line.to_string()));
        assert_eq!(log.take(), (5..KEPT_LINES + 5).map(|line| line.to_string()).collect::<Vec<_>>());
    }
}
