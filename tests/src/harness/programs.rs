//! Finding the programs under test.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Folder of programs to test instead of the ones in the target folder.
const PROGRAMS_VARIABLE: &str = "PEAPOD_TEST_PROGRAMS";

/// The workspace's root: what paths in the demo's job file are relative to.
#[must_use]
pub fn workspace() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).to_owned()
}

/// The path of a program of this workspace, as `cargo build --workspace` left it beside the tests; or in the folder that
/// `$PEAPOD_TEST_PROGRAMS` names.
///
/// # Panics
/// If it is not there, or was built from other sources than the present ones: a test of yesterday's program says nothing.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    if let Some(folder) = std::env::var_os(PROGRAMS_VARIABLE) {
        return Path::new(&folder).join(name);
    }
    // target/PROFILE/deps/stories-HASH
    let test = std::env::current_exe().expect("the path of this test");
    let path = test.parent().and_then(Path::parent).expect("a test lies in target/PROFILE/deps").join(name);
    let Some(built) = modified(&path) else {
        panic!("{} is not there: run `cargo build --workspace` first", path.display());
    };
    if let Some(newer) = sources(&path).into_iter().find(|source| modified(source).is_none_or(|edited| edited > built)) {
        panic!("{} is older than {}: run `cargo build --workspace` first", path.display(), newer.display());
    }
    path
}

fn modified(path: &Path) -> Option<SystemTime> {
    path.metadata().and_then(|metadata| metadata.modified()).ok()
}

/// What cargo says the program is made of: a line `PROGRAM: SOURCE SOURCE ..` in a file beside it.
fn sources(program: &Path) -> Vec<PathBuf> {
    let rule = std::fs::read_to_string(program.with_extension("d")).unwrap_or_default();
    let Some((_, sources)) = rule.trim_end().split_once(": ") else { return Vec::new() };
    // Spaces within a path are escaped.
    sources.replace("\\ ", "\0").split(' ').map(|source| PathBuf::from(source.replace('\0', " "))).collect()
}
