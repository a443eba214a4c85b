//! Gives the library the name that programs ask the loader for, so that a copy loaded by its path answers to it.
//! Not `libcuda.so.1`: NVRTC looks for that one, and needs no driver.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Cargo has no narrower setting that reaches an example that is a library.
    println!("cargo:rustc-link-arg=-Wl,-soname,libcuda.so");
    // The loader would take a test program of that name for the library: the last name counts.
    println!("cargo:rustc-link-arg-tests=-Wl,-soname,test");
}
