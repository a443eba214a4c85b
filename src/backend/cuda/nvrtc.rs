//! Compiles kernels with NVRTC, NVIDIA's run-time compiler.
//!
//! A real architecture (`sm_80`) runs the assembler too: the image is then machine code, and the log tells registers,
//! spills and shared memory. PTX is kept beside it for drivers that refuse the image (a simulated one, say).

use super::launch::SOURCES;
use super::library;
use crate::error::{Error, Result};
use cudarc::nvrtc::{result, sys};
use std::ffi::{CStr, CString};

/// A compiled kernel file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compiled {
    /// Machine code.
    pub cubin: Vec<u8>,
    /// PTX, without a closing NUL.
    pub ptx: Vec<u8>,
    /// What the assembler said of each kernel.
    pub log: String,
}

/// What a kernel takes, as the assembler found it.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Resources {
    /// The kernel's name.
    pub kernel: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes a thread stores because registers ran out.
    pub spill_stores: u32,
    /// Bytes a thread loads for the same reason.
    pub spill_loads: u32,
    /// Bytes of local memory of a thread.
    pub stack: u32,
    /// Bytes of static shared memory of a block.
    pub shared: u32,
    /// Whether the assembler waits after every `wgmma`, because it could not follow the products under way.
    pub serialized: bool,
}

/// Version of NVRTC, major and minor.
///
/// # Errors
/// When there is no NVRTC of CUDA 13.
pub fn version() -> Result<(i32, i32)> {
    library::load_nvrtc()?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: two valid places to write to.
    check(unsafe { sys::nvrtcVersion(&mut major, &mut minor) }, "tell its version")?;
    if major != 13 {
        return Err(Error::usage(format!(
            "the NVRTC that is found is {major}.{minor}, but the kernels need 13: take its folder off LD_LIBRARY_PATH, run \
             scripts/fetch-nvrtc and set {}=target/nvrtc",
            library::NVRTC_FOLDER
        )));
    }
    Ok((major, minor))
}

/// Text of the kernel file `file` (`ln_linear` for `kernels/ln_linear.cu`).
pub fn source(file: &str) -> Option<&'static str> {
    SOURCES.iter().find(|(name, _)| name.strip_suffix(".cu") == Some(file)).map(|(_, text)| *text)
}

/// The options of a compilation: `-D` for each of `defines`.
pub fn options(arch: u32, defines: &[(&str, i64)]) -> Vec<String> {
    // wgmma is not among what newer architectures take over.
    let own = if arch == 90 { "a" } else { "" };
    let mut options = vec![
        format!("--gpu-architecture=sm_{arch}{own}"),
        "--std=c++17".to_string(),
        "--ptxas-options=-v".to_string(),
        "-default-device".to_string(),
    ];
    options.extend(defines.iter().map(|(name, value)| format!("-D{name}={value}")));
    options
}

/// Compiles `kernels/FILE.cu` with `options`.
///
/// # Errors
/// When there is no such file, no NVRTC, or the text does not compile: with the compiler's log.
pub fn compile(file: &str, options: &[String]) -> Result<Compiled> {
    library::load_nvrtc()?;
    let text = source(file).ok_or_else(|| Error::usage(format!("there is no kernel file {file}.cu")))?;
    let c = |text: &str| CString::new(text).map_err(|_| Error::usage(format!("kernels/{file}.cu holds a NUL byte")));
    let (text, name) = (c(text)?, c(&format!("{file}.cu"))?);
    let headers: Vec<_> = SOURCES.iter().filter(|(name, _)| name.ends_with(".cuh")).collect();
    let texts = headers.iter().map(|(_, text)| c(text)).collect::<Result<Vec<_>>>()?;
    let names = headers.iter().map(|(name, _)| c(name)).collect::<Result<Vec<_>>>()?;
    let pointers = |strings: &[CString]| strings.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
    let (text_pointers, name_pointers) = (pointers(&texts), pointers(&names));
    let mut program = Program(std::ptr::null_mut());
    // SAFETY: the strings end in NUL and outlive the program, and both lists have `headers.len()` entries.
    let status = unsafe {
        sys::nvrtcCreateProgram(
            &mut program.0,
            text.as_ptr(),
            name.as_ptr(),
            headers.len() as i32,
            text_pointers.as_ptr(),
            name_pointers.as_ptr(),
        )
    };
    check(status, "create a program")?;
    // SAFETY: the program was created above and lives.
    let compiled = unsafe { result::compile_program(program.0, options) };
    let log = program.bytes(sys::nvrtcGetProgramLogSize, sys::nvrtcGetProgramLog, "give its log")?;
    let log = String::from_utf8_lossy(until_nul(&log)).into_owned();
    if let Err(e) = compiled {
        return Err(Error::Stopped(format!(
            "kernels/{file}.cu does not compile with {}: {e}\n{log}",
            options.join(" ")
        )));
    }
    let cubin = program.bytes(sys::nvrtcGetCUBINSize, sys::nvrtcGetCUBIN, "give machine code")?;
    let ptx = program.bytes(sys::nvrtcGetPTXSize, sys::nvrtcGetPTX, "give PTX")?;
    Ok(Compiled { cubin, ptx: until_nul(&ptx).to_vec(), log })
}

/// Reads the assembler's log.
pub fn resources(log: &str) -> Vec<Resources> {
    let mut found: Vec<Resources> = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or_default().to_string();
            found.push(Resources { kernel, ..Resources::default() });
        } else if let Some(last) = found.last_mut() {
            for part in line.split(',') {
                let words: Vec<&str> = part.split_whitespace().collect();
                let number = words.iter().find_map(|w| w.parse::<u32>().ok()).unwrap_or(0);
                match () {
                    () if part.contains("stack frame") => last.stack = number,
                    () if part.contains("spill stores") => last.spill_stores = number,
                    () if part.contains("spill loads") => last.spill_loads = number,
                    () if part.contains("registers") => last.registers = number,
                    () if part.contains("bytes smem") => last.shared = number,
                    () => {}
                }
            }
        }
    }
    for line in log.lines().filter(|line| line.contains("wgmma") && line.contains("serialized")) {
        let named = |kernel: &str| line.contains(&format!("'{kernel}'"));
        found.iter_mut().filter(|found| named(&found.kernel)).for_each(|found| found.serialized = true);
    }
    found
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|&b| b == 0).next().unwrap_or_default()
}

fn check(status: sys::nvrtcResult, what: &str) -> Result<()> {
    status.result().map_err(|e| {
        // SAFETY: returns a static string for every value.
        let text = unsafe { CStr::from_ptr(sys::nvrtcGetErrorString(e.0)) };
        Error::Stopped(format!("NVRTC cannot {what}: {}", text.to_string_lossy()))
    })
}

struct Program(sys::nvrtcProgram);

impl Program {
    /// What a pair of NVRTC's functions for size and contents gives.
    fn bytes(
        &self,
        size_of: unsafe fn(sys::nvrtcProgram, *mut usize) -> sys::nvrtcResult,
        get: unsafe fn(sys::nvrtcProgram, *mut std::ffi::c_char) -> sys::nvrtcResult,
        what: &str,
    ) -> Result<Vec<u8>> {
        let mut size = 0;
        // SAFETY: the program lives; `size` is a valid place to write to.
        check(unsafe { size_of(self.0, &mut size) }, what)?;
        let mut bytes = vec![0u8; size];
        if size > 0 {
            // SAFETY: `bytes` has the size that NVRTC asked for.
            check(unsafe { get(self.0, bytes.as_mut_ptr().cast()) }, what)?;
        }
        Ok(bytes)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: created by NVRTC, destroyed once.
            unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_assembler_is_understood() {
        let log = "\
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient register \
resources for the wgmma pipeline in the function 'slow'
ptxas info    : Compiling entry function 'slow' for 'sm_90a'
ptxas info    : Function properties for slow
ptxas         .     104 bytes stack frame, 116 bytes spill stores, 120 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 104 bytes cumulative stack size, 2048 bytes smem
ptxas info    : Compiling entry function 'fast' for 'sm_90a'
ptxas info    : Function properties for fast
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
";
        let slow = Resources {
            kernel: "slow".into(),
            registers: 255,
            spill_stores: 116,
            spill_loads: 120,
            stack: 104,
            shared: 2048,
            serialized: true,
        };
        let fast = Resources { kernel: "fast".into(), registers: 40, ..Resources::default() };
        assert_eq!(resources(log), [slow, fast]);
    }
}
