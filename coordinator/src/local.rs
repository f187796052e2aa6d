//! `--local`: the workers as child processes of the coordinator, on one machine.

use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command as Process};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::core::Event;
use crate::driver::Command;

/// How the children are started.
#[derive(Debug, Clone)]
pub struct Local {
    /// The `worker` program.
    pub program: PathBuf,
    /// Number of workers.
    pub world_size: u32,
    /// Address they join.
    pub coordinator: String,
    /// How often dead ones are started again, all together.
    pub max_restarts: u32,
}

/// A child that is told to stop gets this long before it is killed.
const GRACE: Duration = Duration::from_secs(10);
/// Exit code of a worker whose arguments or job are wrong: another start would end the same way.
const BAD_ARGUMENTS: i32 = 2;

impl Local {
    /// Finds the `worker` program beside this one, or in PATH.
    #[must_use]
    pub fn find_program() -> PathBuf {
        let beside = std::env::current_exe().ok().and_then(|own| Some(own.parent()?.join("worker")));
        beside.filter(|path| path.is_file()).unwrap_or_else(|| PathBuf::from("worker"))
    }

    /// Runs the workers until `over` turns true, then waits for them.
    ///
    /// A worker that dies is started again while the budget lasts; then the job is given up.
    ///
    /// # Errors
    /// If a worker cannot be started at all.
    pub async fn run(self, commands: mpsc::Sender<Command>, mut over: watch::Receiver<bool>) -> std::io::Result<()> {
        let mut children: JoinSet<(u32, std::io::Result<ExitStatus>)> = JoinSet::new();
        for rank in 0..self.world_size {
            self.start(rank, &mut children, over.clone())?;
        }
        let mut restarts = 0;
        loop {
            let ended = tokio::select! {
                ended = children.join_next() => ended,
                _ = over.wait_for(|&over| over) => break,
            };
            let Some(Ok((rank, status))) = ended else { break };
            if *over.borrow() {
                break;
            }
            let status = status?;
            let cause = describe(status);
            if status.success() || status.code() == Some(BAD_ARGUMENTS) {
                // Drained on request, or refused: neither is cured by another start.
                tracing::info!("worker of rank {rank} {cause}");
                continue;
            }
            if restarts >= self.max_restarts {
                let reason = format!("worker of rank {rank} {cause}, and no restart is left (--max-restarts {})", self.max_restarts);
                let _ = commands.send(Command::Tell(Event::GiveUp { reason })).await;
                continue;
            }
            restarts += 1;
            tracing::warn!("worker of rank {rank} {cause}; starting it again (restart {restarts} of {})", self.max_restarts);
            self.start(rank, &mut children, over.clone())?;
        }
        while children.join_next().await.is_some() {}
        Ok(())
    }

    fn start(
        &self,
        rank: u32,
        children: &mut JoinSet<(u32, std::io::Result<ExitStatus>)>,
        over: watch::Receiver<bool>,
    ) -> std::io::Result<()> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        // Workers whose thread pools overlap spin against each other.
        let threads = (cores / self.world_size as usize).max(1);
        let mut process = Process::new(&self.program);
        process
            .args(["--rank", &rank.to_string(), "--coordinator", &self.coordinator, "--threads", &threads.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C is for the coordinator, which ends the job in order.
            .process_group(0)
            // Idle threads of a pool sleep instead of spinning on cores that another worker needs. libgomp reads it as it is loaded.
            .env("OMP_WAIT_POLICY", "PASSIVE")
            .kill_on_drop(true);
        die_with_parent(&mut process);
        let mut child = process.spawn().map_err(|error| {
            std::io::Error::new(error.kind(), format!("cannot start {}: {error}; build it with `cargo build`", self.program.display()))
        })?;
        forward(rank, child.stdout.take());
        forward(rank, child.stderr.take());
        children.spawn(async move { (rank, wait(child, over).await) });
        Ok(())
    }
}

/// Waits for a child; one that outlives the job by far is killed.
async fn wait(mut child: Child, mut over: watch::Receiver<bool>) -> std::io::Result<ExitStatus> {
    tokio::select! {
        status = child.wait() => return status,
        _ = over.wait_for(|&over| over) => {}
    }
    match tokio::time::timeout(GRACE, child.wait()).await {
        Ok(status) => status,
        Err(_) => {
            child.kill().await?;
            child.wait().await
        }
    }
}

/// Leaves no orphan when the coordinator is killed.
fn die_with_parent(process: &mut Process) {
    #[cfg(target_os = "linux")]
    // SAFETY: prctl with PR_SET_PDEATHSIG is async-signal-safe, touches no memory of this process, and takes these arguments.
    #[allow(unsafe_code)]
    unsafe {
        process.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
}

/// Repeats a child's lines with its rank before them.
fn forward(rank: u32, pipe: Option<impl AsyncRead + Unpin + Send + 'static>) {
    let Some(pipe) = pipe else { return };
    tokio::spawn(async move {
        let mut lines = BufReader::new(pipe).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            tracing::info!(target: "worker", "[{rank}] {line}");
        }
    });
}

fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with code {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}{}", signal_name(signal)),
        (None, None) => "ended".into(),
    }
}

fn signal_name(signal: i32) -> &'static str {
    match signal {
        libc::SIGKILL => " (SIGKILL; the kernel sends it when memory runs out)",
        libc::SIGSEGV => " (SIGSEGV)",
        libc::SIGABRT => " (SIGABRT)",
        libc::SIGTERM => " (SIGTERM)",
        _ => "",
    }
}
