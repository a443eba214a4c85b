//! The device: memory, modules and launches.

use crate::arch::{self, Arch};
use crate::compile;
use crate::counters::LaunchReport;
use crate::error::{Fault, LoadError, MemoryError};
use crate::exec;
use crate::memory::{Leak, Memory};
use crate::options::Options;
use crate::program::Program;
use std::collections::BTreeMap;
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// One simulated GPU. All calls take `&self` and may come from several threads; a launch runs to its end before the
/// call returns.
pub struct Device {
    arch: Arch,
    options: Options,
    memory: Arc<RwLock<Memory>>,
}

/// A loaded module. Dropping it frees its `.global` and `.const` variables, so keep it while functions of it run.
pub struct Module {
    functions: BTreeMap<String, Function>,
    globals: BTreeMap<String, (u64, u64)>,
    memory: Arc<RwLock<Memory>>,
}

/// A kernel of a loaded module.
#[derive(Clone)]
pub struct Function(pub(crate) Arc<Program>);

/// One kernel parameter in parameter space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Param {
    /// Name in the PTX.
    pub name: String,
    /// Byte offset in the parameter buffer.
    pub offset: u32,
    /// Bytes.
    pub bytes: u32,
    /// Alignment in bytes.
    pub align: u32,
}

/// Shape of a launch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchConfig {
    /// Blocks in x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y, z.
    pub block: [u32; 3],
    /// Blocks of a cluster; only 1, 1, 1 is simulated.
    pub cluster: [u32; 3],
    /// Dynamic shared memory, bytes.
    pub dynamic_shared: u32,
    /// What the function attribute MAX_DYNAMIC_SHARED_SIZE_BYTES allows; `None` is the default, 48 KB with the
    /// static shared memory.
    pub max_dynamic_shared: Option<u32>,
    /// Registers of a thread when the assembler's log gave them: the simulator's own number is an estimate.
    pub registers: Option<u32>,
}

impl LaunchConfig {
    /// A launch without dynamic shared memory.
    pub fn new(grid: [u32; 3], block: [u32; 3]) -> LaunchConfig {
        LaunchConfig { grid, block, cluster: [1; 3], dynamic_shared: 0, max_dynamic_shared: None, registers: None }
    }

    /// The same with `bytes` of dynamic shared memory, opted in to.
    pub fn with_shared(mut self, bytes: u32) -> LaunchConfig {
        self.dynamic_shared = bytes;
        self.max_dynamic_shared = Some(bytes);
        self
    }
}

impl Device {
    /// A device of architecture `arch` with empty memory.
    pub fn new(arch: Arch, options: Options) -> Device {
        let memory = Memory::new(arch.memory_bytes, options.sanitizer.uninitialised);
        Device { arch, options, memory: Arc::new(RwLock::new(memory)) }
    }

    /// Limits of this device.
    pub fn arch(&self) -> &Arch {
        &self.arch
    }

    /// What this device checks.
    pub fn options(&self) -> &Options {
        &self.options
    }

    fn memory(&self) -> RwLockWriteGuard<'_, Memory> {
        write(&self.memory)
    }

    /// `bytes` of uninitialised memory, aligned to 1024.
    pub fn alloc(&self, bytes: u64) -> Result<u64, MemoryError> {
        self.memory().alloc(bytes, None, false)
    }

    /// Like [`Device::alloc`], with a name that reports use.
    pub fn alloc_named(&self, bytes: u64, name: &str) -> Result<u64, MemoryError> {
        self.memory().alloc(bytes, Some(name), false)
    }

    /// Frees what `alloc` gave.
    pub fn free(&self, address: u64) -> Result<(), MemoryError> {
        self.memory().free(address)
    }

    /// Copies device memory to the host. Unwritten bytes read as zero: see [`Device::first_unwritten`].
    pub fn read(&self, address: u64, out: &mut [u8]) -> Result<(), MemoryError> {
        self.memory().read(address, out)
    }

    /// Copies host memory to the device.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        self.memory().write(address, bytes)
    }

    /// Writes `pattern` `count` times.
    pub fn memset(&self, address: u64, pattern: &[u8], count: u64) -> Result<(), MemoryError> {
        self.memory().fill(address, pattern, count)
    }

    /// Copies within the device; bytes that were unwritten stay so.
    pub fn copy(&self, to: u64, from: u64, bytes: u64) -> Result<(), MemoryError> {
        self.memory().copy(to, from, bytes)
    }

    /// Declares `bytes` at `address` unwritten again, without changing them.
    pub fn poison(&self, address: u64, bytes: u64) -> Result<(), MemoryError> {
        self.memory().mark(address, bytes, false)
    }

    /// Address of the first byte of a range that nobody wrote.
    pub fn first_unwritten(&self, address: u64, bytes: u64) -> Result<Option<u64>, MemoryError> {
        self.memory().unwritten(address, bytes)
    }

    /// Base and length of the live allocation that holds `address`.
    pub fn address_range(&self, address: u64) -> Option<(u64, u64)> {
        read(&self.memory).range(address)
    }

    /// Free and total bytes.
    pub fn mem_info(&self) -> (u64, u64) {
        read(&self.memory).info()
    }

    /// Allocations that are still live. Module variables are not among them.
    pub fn leaks(&self) -> Vec<Leak> {
        let all = read(&self.memory).all();
        let user = all.iter().filter(|a| !a.label.starts_with(compile::VARIABLE));
        user.map(|a| Leak { address: a.base, bytes: a.bytes, label: a.label.clone() }).collect()
    }

    /// Reads and compiles PTX. Whatever the simulator does not know is refused here, with its text and line.
    pub fn load_module(&self, ptx: &str) -> Result<Module, LoadError> {
        let tree = crate::ptx::parse(ptx)?;
        let mut globals = BTreeMap::new();
        let built = compile::module(&tree, &self.arch, &mut self.memory(), &mut globals);
        let module = |functions| Module { functions, globals, memory: self.memory.clone() };
        match built {
            Ok(programs) => {
                let functions = programs.into_iter().map(|p| (p.name.clone(), Function(Arc::new(p)))).collect();
                Ok(module(functions))
            }
            // Dropping the module frees the variables made before the error.
            Err(e) => {
                drop(module(BTreeMap::new()));
                Err(e)
            }
        }
    }

    /// Runs a kernel to its end. `params` is the parameter buffer, laid out as [`Function::params`] says.
    ///
    /// Errors: a refusal with the driver's error code, or what the sanitizer found.
    pub fn launch(&self, function: &Function, config: &LaunchConfig, params: &[u8]) -> Result<LaunchReport, Fault> {
        self.check_launch(function, config)?;
        let program = &function.0;
        if params.len() != program.param_bytes as usize {
            let (want, got) = (program.param_bytes, params.len());
            return Err(Fault::refused(
                1,
                format!("kernel {} takes {want} bytes of parameters, got {got}", program.name),
            ));
        }
        let memory = self.memory();
        exec::launch(&self.arch, &self.options, &memory, program, config, params)
    }

    /// Whether this GPU would accept such a launch.
    pub fn check_launch(&self, function: &Function, config: &LaunchConfig) -> Result<(), Fault> {
        let (p, name) = (&function.0, &function.0.name);
        let refuse = |code: u32, text: String| Err(Fault::refused(code, format!("kernel {name}: {text}")));
        let cluster = if config.cluster == [1; 3] { p.attributes.cluster.unwrap_or([1; 3]) } else { config.cluster };
        if cluster != [1; 3] {
            let blocks = cluster.iter().fold(1u32, |n, &c| n.saturating_mul(c));
            if !(1..=arch::MAX_CLUSTER).contains(&blocks) {
                return refuse(912, format!("a cluster of {cluster:?} blocks, at most {}", arch::MAX_CLUSTER));
            }
            return refuse(801, "clusters larger than one block are not simulated".into());
        }
        let limits = [i32::MAX as u32, 65_535, 65_535];
        for (dim, (&n, limit)) in config.grid.iter().zip(limits).enumerate() {
            if n == 0 || n > limit {
                return refuse(1, format!("grid dimension {dim} is {n}, must be in 1..={limit}"));
            }
        }
        for (dim, (&n, limit)) in config.block.iter().zip([1024u32, 1024, 64]).enumerate() {
            if n == 0 || n > limit {
                return refuse(1, format!("block dimension {dim} is {n}, must be in 1..={limit}"));
            }
        }
        let threads: u32 = config.block.iter().product();
        if threads > arch::MAX_THREADS_PER_BLOCK {
            return refuse(1, format!("{threads} threads in a block, at most {}", arch::MAX_THREADS_PER_BLOCK));
        }
        if p.attributes.reqntid.is_some_and(|r| r != config.block) {
            return refuse(1, format!("block {:?} differs from .reqntid {:?}", config.block, p.attributes.reqntid));
        }
        if threads > function.max_threads() {
            return refuse(1, format!("{threads} threads in a block, but .maxntid allows {}", function.max_threads()));
        }
        // Only the assembler's number may refuse a launch: the own one is an estimate.
        let registers = config.registers.unwrap_or(32);
        if !self.arch.registers_fit(threads, registers) {
            return refuse(
                701,
                format!(
                    "{threads} threads with {registers} registers each need more than {}",
                    self.arch.registers_per_sm
                ),
            );
        }
        let allowed = config.max_dynamic_shared.unwrap_or(arch::SHARED_DEFAULT.saturating_sub(p.static_shared));
        let total = u64::from(p.static_shared) + u64::from(config.dynamic_shared);
        if config.dynamic_shared > allowed && config.dynamic_shared > 0 {
            return refuse(
                1,
                format!("{} bytes of dynamic shared memory, the function allows {allowed}", config.dynamic_shared),
            );
        }
        if total > u64::from(self.arch.shared_per_block_optin) {
            return refuse(
                1,
                format!("{total} bytes of shared memory, a block has at most {}", self.arch.shared_per_block_optin),
            );
        }
        Ok(())
    }
}

impl Module {
    /// The kernel called `name`.
    pub fn function(&self, name: &str) -> Option<Function> {
        self.functions.get(name).cloned()
    }

    /// Names of all kernels, sorted.
    pub fn functions(&self) -> impl Iterator<Item = &str> {
        self.functions.keys().map(String::as_str)
    }

    /// Address and bytes of a module variable.
    pub fn global(&self, name: &str) -> Option<(u64, u64)> {
        self.globals.get(name).copied()
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let mut memory = write(&self.memory);
        for (address, _) in self.globals.values() {
            // Freed once, by their only owner: this cannot fail.
            let _ = memory.free(*address);
        }
    }
}

impl Function {
    /// Name of the kernel.
    pub fn name(&self) -> &str {
        &self.0.name
    }
    /// Parameters in order.
    pub fn params(&self) -> &[Param] {
        &self.0.params
    }
    /// Bytes of the parameter buffer.
    pub fn param_bytes(&self) -> u32 {
        self.0.param_bytes
    }
    /// Static shared memory, bytes.
    pub fn static_shared(&self) -> u32 {
        self.0.static_shared
    }
    /// Local memory of one thread, bytes.
    pub fn local_bytes(&self) -> u32 {
        self.0.local_bytes
    }
    /// `.const` memory of the module that the kernel can see, bytes.
    pub fn const_bytes(&self) -> u32 {
        self.0.const_bytes
    }
    /// Registers of a thread: `.maxnreg` or a nominal 32. Only the assembler knows the real number, which a launch can be
    /// told in [`LaunchConfig::registers`].
    pub fn registers(&self) -> u32 {
        self.0.registers
    }
    /// Most threads of a block, from `.maxntid` and `.reqntid`.
    pub fn max_threads(&self) -> u32 {
        let product = |d: [u32; 3]| d.iter().fold(1u32, |a, &b| a.saturating_mul(b));
        let declared = self.0.attributes.reqntid.or(self.0.attributes.maxntid).map(product);
        declared.unwrap_or(arch::MAX_THREADS_PER_BLOCK).min(arch::MAX_THREADS_PER_BLOCK)
    }
    /// The block shape that `.reqntid` demands.
    pub fn required_block(&self) -> Option<[u32; 3]> {
        self.0.attributes.reqntid
    }
    /// PTX version of the module, e.g. 88 for 8.8.
    pub fn ptx_version(&self) -> u32 {
        self.0.ptx_version
    }
    /// The decoded program as text, one instruction a line.
    pub fn disassemble(&self) -> String {
        self.0.disassemble()
    }
}

fn write(m: &RwLock<Memory>) -> RwLockWriteGuard<'_, Memory> {
    m.write().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn read(m: &RwLock<Memory>) -> RwLockReadGuard<'_, Memory> {
    m.read().unwrap_or_else(std::sync::PoisonError::into_inner)
}
