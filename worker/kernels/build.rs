//! Compiles the shim to libtorch's graph, and records where libtorch lies, so that tests start without LD_LIBRARY_PATH.

use std::path::Path;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=cuda/graph.cpp");
    println!("cargo:rerun-if-env-changed=LIBTORCH_INCLUDE");
    println!("cargo:rerun-if-env-changed=LIBTORCH_CXX11_ABI");
    let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") else { return };
    // The variables are those of torch-sys, which looks for the headers in the same places.
    let root = std::env::var("LIBTORCH_INCLUDE").map_or_else(|_| Path::new(&lib).join(".."), Into::into);
    let abi = std::env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".into());
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .pic(true)
        .warnings(false)
        .include(root.join("include"))
        .include(root.join("include/torch/csrc/api/include"))
        .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
        .file("cuda/graph.cpp")
        .compile("peapod_graph");
    for path in [lib.clone(), format!("{lib}/../../nvidia/cu13/lib"), format!("{lib}/../../nvidia/nccl/lib"), "$ORIGIN/../lib".into()] {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{path}");
    }
}
