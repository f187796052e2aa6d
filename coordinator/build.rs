//! Notes the facts of the build for `--version`.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=PEAPOD_COMMIT");
    let profile = std::env::var("PROFILE").unwrap_or_default();
    println!("cargo:rustc-env=PEAPOD_PROFILE={profile}");
    let compiler = std::env::var("RUSTC").ok().and_then(|rustc| Command::new(rustc).arg("--version").output().ok());
    let compiler = compiler.and_then(|output| String::from_utf8(output.stdout).ok()).unwrap_or_else(|| "rustc".into());
    println!("cargo:rustc-env=PEAPOD_RUSTC={}", compiler.trim());
    // An image is built without the repository and says it by PEAPOD_COMMIT. A debug build would be compiled again after each commit.
    if std::env::var_os("PEAPOD_COMMIT").is_none()
        && profile == "release"
        && let Some(commit) = commit(Path::new("../.git"))
    {
        println!("cargo:rustc-env=PEAPOD_COMMIT={commit}");
    }
}

/// The commit that is checked out, read without git.
fn commit(git: &Path) -> Option<String> {
    let read = |path: PathBuf| {
        println!("cargo:rerun-if-changed={}", path.display());
        std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
    };
    let head = read(git.join("HEAD"))?;
    let Some(name) = head.strip_prefix("ref: ") else { return Some(head) };
    let packed = || read(git.join("packed-refs"))?.lines().find_map(|line| line.strip_suffix(name)?.strip_suffix(' ').map(str::to_owned));
    // A file that is not there counts as changed: only those that are there are looked at.
    if git.join(name).is_file() { read(git.join(name)) } else { packed() }
}
