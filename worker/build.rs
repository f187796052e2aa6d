//! Records where libtorch lies, so that binaries and tests start without LD_LIBRARY_PATH.
//!
//! A `rustc-link-arg` reaches only the package that prints it, so every package with a torch-linked target runs this one.

fn main() {
    // Any one of these, or cargo runs this whenever a file of the package changes.
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") else { return };
    // Beside libtorch, where the wheels put the NVIDIA libraries; and ../lib, where the container images put all of them.
    for path in [lib.clone(), format!("{lib}/../../nvidia/cu13/lib"), format!("{lib}/../../nvidia/nccl/lib"), "$ORIGIN/../lib".into()] {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{path}");
    }
}
