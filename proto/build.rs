//! Compiles `peapod/v1/*.proto` with protox, so that no protoc has to be installed.

use std::path::PathBuf;

const PROTOS: [&str; 4] =
    ["peapod/v1/membership.proto", "peapod/v1/checkpoint.proto", "peapod/v1/control.proto", "peapod/v1/pictures.proto"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=peapod");
    let root = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?);
    let files = protox::compile(PROTOS, [&root])?;
    tonic_prost_build::configure().emit_rerun_if_changed(false).compile_fds(files)?;
    Ok(())
}
