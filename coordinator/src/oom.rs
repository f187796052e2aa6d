//! Whether the kernel has killed processes because memory ran out.
//!
//! A process that dies this way cannot say so, and its parent sees a SIGKILL like any other. The kernel counts such kills: of this control
//! group (children are in it too) in `memory.events`, of the whole machine in `/proc/vmstat`.

use std::fs;
use std::path::{Path, PathBuf};

/// The counters at some time.
#[derive(Debug, Clone)]
pub struct OutOfMemory {
    counters: Vec<Counter>,
}

#[derive(Debug, Clone)]
struct Counter {
    file: PathBuf,
    count: u64,
}

/// Counts the kills since boot, on Linux.
const VMSTAT: &str = "/proc/vmstat";

impl OutOfMemory {
    /// The counters as they are; empty where the kernel has none.
    #[must_use]
    pub fn now() -> Self {
        let own = fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| events_file(&text));
        Self::of(own.into_iter().chain([VMSTAT.into()]))
    }

    fn of(files: impl IntoIterator<Item = PathBuf>) -> Self {
        let counter = |file: PathBuf| Some(Counter { count: read(&file)?, file });
        Self { counters: files.into_iter().filter_map(counter).collect() }
    }

    /// What the kernel says if it has killed a process since then.
    #[must_use]
    pub fn since(&self) -> Option<String> {
        let rose = |counter: &Counter| read(&counter.file).is_some_and(|count| count > counter.count);
        let counter = self.counters.iter().find(|counter| rose(counter))?;
        Some(format!("oom_kill rose in {}", counter.file.display()))
    }
}

/// The counter in a file of lines "name number".
fn read(file: &Path) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

/// The file of the control group that a process is in, by its `/proc/PID/cgroup`. Version 2 of control groups only: the other has no such
/// count.
fn events_file(cgroup: &str) -> Option<PathBuf> {
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(Path::new("/sys/fs/cgroup").join(path).join("memory.events"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kill_shows_as_a_counter_that_rose() {
        let folder = tempfile::tempdir().unwrap();
        let (group, machine) = (folder.path().join("memory.events"), folder.path().join("vmstat"));
        fs::write(&group, "low 0\noom 2\noom_kill 1\n").unwrap();
        fs::write(&machine, "pgfault 12\noom_kill 7\n").unwrap();
        let before = OutOfMemory::of([group.clone(), machine.clone(), folder.path().join("missing")]);
        assert_eq!(before.since(), None);
        fs::write(&machine, "pgfault 13\noom_kill 8\n").unwrap();
        assert_eq!(before.since(), Some(format!("oom_kill rose in {}", machine.display())));
        fs::write(&group, "low 0\noom 3\noom_kill 2\n").unwrap();
        assert_eq!(before.since(), Some(format!("oom_kill rose in {}", group.display())), "the nearer one is named");
    }

    #[test]
    fn own_control_group_is_found() {
        let text = "12:pids:/user\n0::/kubepods/pod1/worker\n";
        assert_eq!(events_file(text), Some("/sys/fs/cgroup/kubepods/pod1/worker/memory.events".into()));
        assert_eq!(events_file("4:memory:/a\n"), None);
    }
}
