//! What is printed for people and scripts that stop reading: `| head`, a pager that was left.

use std::process::{Command, Stdio};

use peapod_tests::harness::{Cluster, Process, program, workspace};

/// Runs a program whose standard output, or both outputs, nobody reads; returns its exit code and what it said on standard error.
fn run_unread(name: &str, arguments: &[&str], is_error_read: bool) -> (Option<i32>, String) {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let error = if is_error_read { Stdio::piped() } else { Stdio::from(writer.try_clone().unwrap()) };
    let mut command = Command::new(program(name));
    command.args(arguments).current_dir(workspace()).stdin(Stdio::null()).stdout(writer).stderr(error).env("OMP_NUM_THREADS", "1");
    let ended = command.spawn().unwrap().wait_with_output().unwrap();
    (ended.status.code(), String::from_utf8(ended.stderr).unwrap())
}

#[track_caller]
fn assert_ends_quietly(name: &str, arguments: &[&str]) {
    let ended = run_unread(name, arguments, true);
    assert_eq!(ended, (Some(0), String::new()), "{name} {arguments:?}");
}

#[test]
fn commands_whose_output_nobody_reads_end_quietly() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("job.toml");
    for arguments in [
        &["init", file.to_str().unwrap()][..],
        &["check", "--job", "tests/demo/job.toml"],
        &["completions", "bash"],
        &["--version"],
        &["--help"],
    ] {
        assert_ends_quietly("coordinator", arguments);
    }
    assert!(file.exists(), "what a command does it does all the same");
    for arguments in [&["check", "--job", "tests/demo/job.toml"][..], &["completions", "bash"], &["--help"]] {
        assert_ends_quietly("worker", arguments);
    }
    assert_ends_quietly("sample", &["completions", "bash"]);
}

#[test]
fn every_program_prints_completions_and_writes_its_manual() {
    let folder = tempfile::tempdir().unwrap();
    for (name, option, pages) in [
        ("coordinator", "--min-world-size", &["coordinator.1", "coordinator-status.1", "coordinator-checkpoints-list.1"][..]),
        ("worker", "--advertise", &["worker.1", "worker-check.1", "worker-shards-make.1"]),
        ("sample", "--scheduler", &["sample.1"]),
    ] {
        let mut completions = Process::start(name, name, &["completions", "bash"]);
        completions.expect_exit(0);
        completions.assert_said(option);
        let out = folder.path().join(name);
        Process::start(name, name, &["man", "--out", out.to_str().unwrap()]).expect_exit(0);
        for page in pages {
            let text = std::fs::read_to_string(out.join(page)).unwrap_or_else(|error| panic!("{page}: {error}"));
            assert!(text.starts_with(".ie") && text.contains(".TH "), "{text}");
        }
        // As roff writes a hyphen.
        let text = std::fs::read_to_string(out.join(pages[0])).unwrap();
        assert!(text.contains(&option.replace('-', "\\-")), "{name} does not explain {option}");
    }
    let nowhere = folder.path().join("coordinator/coordinator.1/pages");
    let mut refused = Process::start("worker", "worker", &["man", "--out", nowhere.to_str().unwrap()]);
    refused.expect_exit(1);
    refused.assert_said("cannot write to ");
}

#[test]
fn status_of_a_running_job_may_be_read_in_part() {
    let cluster = Cluster::new();
    let coordinator = cluster.coordinator(1, &[]);
    let url = coordinator.url();
    for arguments in [&["status"][..], &["status", "--json"], &["status", "--shards"], &["status", "--watch"]] {
        assert_ends_quietly("coordinator", &[arguments, &["--coordinator", &url]].concat());
    }
}

#[test]
fn exit_code_is_the_same_when_nobody_listens() {
    // 75: no coordinator there. To say so to nobody is no other end.
    let (listener, refused) = (std::net::TcpListener::bind("127.0.0.1:0").unwrap(), ["--connect-timeout", "0s", "--device", "cpu"]);
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    assert_eq!(run_unread("worker", &[&["--coordinator", &url], &refused[..]].concat(), false).0, Some(75));
    assert_eq!(run_unread("coordinator", &["status", "--coordinator", &url], false).0, Some(1));
    assert_eq!(run_unread("sample", &["--model", "nowhere", "--prompt", "a", "--out", "a.png"], false).0, Some(2));
}

#[test]
fn job_goes_on_when_nobody_reads_its_summary() {
    let mut cluster = Cluster::new();
    cluster.job.set_steps(1);
    let arguments = cluster.local_arguments();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    assert_eq!(run_unread("coordinator", &arguments, false).0, Some(0));
    assert_eq!(cluster.newest_checkpoint().step, 1);
}
