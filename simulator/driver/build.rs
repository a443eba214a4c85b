//! Gives the library the name that programs ask the loader for, so that a copy loaded by its path answers to it.
//! Not `libcuda.so.1`: NVRTC looks for that one, and needs no driver.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-link-arg-examples=-Wl,-soname,libcuda.so");
}
