//! The compiler: a tree to one decoded program per kernel. Whatever is unknown is refused with its line and text.

mod bits;
mod body;
mod compare;
mod control;
mod convert;
mod float;
mod float_lane;
mod integer;
mod matrix;
mod memory;
mod mods;
mod moves;
mod names;
mod operands;
mod sync;
mod tensor;
mod types;
mod video;

use crate::arch::{Arch, MAX_PARAM_BYTES};
use crate::device::Param;
use crate::error::LoadError;
use crate::memory::Memory;
use crate::program::{FuncInfo, Inst, Kind, Program, Source, product_lines};
use crate::ptx::ast::{Func, Init, Module, Operand, Space, Stmt, Var};
use std::collections::{BTreeMap, HashMap, HashSet};

/// Labels of allocations that are module variables start like this.
pub(crate) const VARIABLE: &str = "variable ";

/// Generic addresses of shared, local and parameter memory. Their low 32 bits are the address in the space itself.
pub(crate) const SHARED_WINDOW: u64 = 0x7f00_0000_0000;
pub(crate) const LOCAL_WINDOW: u64 = 0x7e00_0000_0000;
pub(crate) const PARAM_WINDOW: u64 = 0x7d00_0000_0000;
/// Size of each window.
pub(crate) const WINDOW: u64 = 1 << 32;
/// Function pointers are this plus the number of the function in its module.
pub(crate) const CODE_WINDOW: u64 = 0x7c00_0000_0000;

/// Most bytes of module variables: real modules have kilobytes.
const MAX_VARIABLES: u64 = 256 << 20;
/// Most instructions of all kernels of a module together.
const MAX_CODE: usize = 8 << 20;
/// Most local memory of one function, bytes (the limit of a GPU thread).
const MAX_LOCAL: u32 = 512 << 10;
/// Most words of a frame: 64 Ki registers.
const MAX_FRAME: u32 = 2 << 20;

type Result<T> = std::result::Result<T, LoadError>;

/// What all functions of a kernel share while it is compiled.
struct Unit<'a> {
    arch: &'a Arch,
    tree: &'a Module,
    /// Addresses of `.global` and `.const` variables.
    globals: &'a HashMap<String, u64>,
    shared_vars: HashMap<&'a str, &'a Var>,
    /// Function name to index in `funcs`.
    indices: HashMap<&'a str, u32>,
    /// Function name to number in the module.
    numbers: &'a HashMap<&'a str, u32>,
    shared: HashMap<String, u32>,
    shared_bytes: u64,
    dynamic_align: u32,
    code: Vec<Inst>,
    /// Entries of all jump tables: they count as instructions.
    targets: usize,
    source: Vec<Source>,
    texts: Vec<String>,
}

/// Compiles all kernels and makes the module's variables. `globals` gets what was made, also when this fails.
pub(crate) fn module(
    tree: &Module,
    arch: &Arch,
    memory: &mut Memory,
    globals: &mut BTreeMap<String, (u64, u64)>,
) -> Result<Vec<Program>> {
    check_target(tree, arch)?;
    let numbers = function_numbers(tree);
    let (addresses, const_bytes) = variables(tree, &numbers, memory, globals)?;
    let mut by_name: HashMap<&str, &Func> = HashMap::new();
    for f in &tree.funcs {
        if f.body.is_some() && by_name.insert(&f.name, f).is_some() {
            return Err(LoadError::new(f.line, &f.name, "this function is defined twice"));
        }
    }
    for (alias, target) in &tree.aliases {
        if let Some(f) = by_name.get(target.as_str()).copied() {
            by_name.insert(alias, f);
        }
    }
    let taken = address_taken(tree, &by_name);
    let mut programs: Vec<Program> = Vec::new();
    let mut total = 0;
    for f in tree.funcs.iter().filter(|f| f.entry && f.body.is_some()) {
        let order = reachable(f, &by_name, &taken);
        let p = kernel(f, &order, tree, &numbers, arch, &addresses, const_bytes)?;
        total += p.code.iter().map(|i| if let Kind::Switch(t) = &i.kind { 1 + t.len() } else { 1 }).sum::<usize>();
        if total > MAX_CODE {
            return Err(LoadError::new(f.line, &f.name, format!("the module has more than {MAX_CODE} instructions")));
        }
        programs.push(p);
    }
    Ok(programs)
}

fn check_target(tree: &Module, arch: &Arch) -> Result<()> {
    let target = tree.target.strip_prefix("sm_").or_else(|| tree.target.strip_prefix("compute_")).unwrap_or("");
    let number = target.trim_end_matches(['a', 'f']);
    let wrong = |message: String| Err(LoadError::new(0, format!(".target {}", tree.target), message));
    let Ok(number) = number.parse::<u32>() else {
        return wrong("this target is unknown".into());
    };
    if number > arch.number() {
        return wrong(format!("the simulated GPU is {}, older than the target", arch.name));
    }
    if target.ends_with('a') && number != arch.number() {
        return wrong(format!("code for this exact architecture does not run on the simulated {}", arch.name));
    }
    Ok(())
}

/// Makes the variables in device memory.
fn variables(
    tree: &Module,
    numbers: &HashMap<&str, u32>,
    memory: &mut Memory,
    globals: &mut BTreeMap<String, (u64, u64)>,
) -> Result<(HashMap<String, u64>, u32)> {
    let (mut addresses, mut total, mut const_bytes) = (HashMap::new(), 0u64, 0u64);
    let mut all: Vec<(String, &Var)> = tree.vars.iter().map(|v| (v.name.clone(), v)).collect();
    for f in &tree.funcs {
        for s in f.body.iter().flatten() {
            if let Stmt::Var(v) = s {
                all.push((format!("{}::{}", f.name, v.name), v));
            }
        }
    }
    all.retain(|(_, v)| matches!(v.space, Space::Global | Space::Const));
    for (name, v) in &all {
        if v.external && v.count == 0 {
            return Err(LoadError::new(v.line, &v.name, "this variable is defined in another module"));
        }
        total = total.saturating_add(v.bytes());
        if v.space == Space::Const {
            const_bytes += v.bytes();
        }
        if total > MAX_VARIABLES || const_bytes > 10 * 65_536 {
            return Err(LoadError::new(v.line, &v.name, format!("{total} bytes of module variables are too many")));
        }
        if addresses.contains_key(name) {
            return Err(LoadError::new(v.line, &v.name, "this variable is declared twice"));
        }
        let label = format!("{VARIABLE}{}", v.name);
        let address = memory
            .alloc(v.bytes(), Some(&label), v.space == Space::Const)
            .map_err(|e| LoadError::new(v.line, &v.name, e.to_string()))?;
        addresses.insert(name.clone(), address);
        globals.insert(name.clone(), (address, v.bytes()));
    }
    for (name, v) in &all {
        let mut bytes = vec![0u8; v.bytes() as usize];
        let size = v.ty.bytes() as usize;
        for (slot, init) in bytes.chunks_exact_mut(size).zip(&v.init) {
            let value = match init {
                Init::Int(i) if matches!(v.ty, crate::ptx::ast::Ty::F32) => u64::from((*i as f32).to_bits()),
                Init::Int(i) if matches!(v.ty, crate::ptx::ast::Ty::F64) => (*i as f64).to_bits(),
                Init::Int(i) => *i as u64,
                Init::F32(b) => u64::from(*b),
                Init::F64(b) if size == 4 => u64::from((f64::from_bits(*b) as f32).to_bits()),
                Init::F64(b) => *b,
                Init::Address { name, offset } => match (addresses.get(name.as_str()), numbers.get(name.as_str())) {
                    (Some(a), _) => a.wrapping_add(*offset as u64),
                    (None, Some(n)) if *offset == 0 => CODE_WINDOW + u64::from(*n),
                    _ => {
                        return Err(LoadError::new(
                            v.line,
                            &v.name,
                            format!("its initial value names `{name}`, which is neither a variable nor a function"),
                        ));
                    }
                },
            };
            if size > 8 {
                return Err(LoadError::new(v.line, &v.name, "initial values of 16 bytes are not supported"));
            }
            slot.copy_from_slice(&value.to_le_bytes()[..size]);
        }
        // Inside the allocation made above.
        let _ = memory.write(addresses[name], &bytes);
    }
    Ok((addresses, const_bytes as u32))
}

/// Every function of the module, declared or defined, and every alias, has a number.
fn function_numbers(tree: &Module) -> HashMap<&str, u32> {
    let mut numbers = HashMap::new();
    for (i, f) in tree.funcs.iter().enumerate() {
        numbers.entry(f.name.as_str()).or_insert(i as u32);
    }
    for (alias, target) in &tree.aliases {
        if let Some(n) = numbers.get(target.as_str()).copied() {
            numbers.insert(alias, n);
        }
    }
    numbers
}

/// The function that an operand names.
fn named<'a>(o: &Operand, by_name: &HashMap<&str, &'a Func>) -> Option<&'a Func> {
    match o {
        Operand::Name(n) => by_name.get(n.as_str()).copied(),
        _ => None,
    }
}

/// Functions whose addresses are in variables or registers: a call through a pointer may reach them.
fn address_taken<'a>(tree: &'a Module, by_name: &HashMap<&str, &'a Func>) -> Vec<&'a Func> {
    let in_variables = tree.vars.iter().flat_map(|v| &v.init).filter_map(|i| match i {
        Init::Address { name, .. } => by_name.get(name.as_str()).copied(),
        _ => None,
    });
    let in_code = tree.funcs.iter().flat_map(|f| f.body.iter().flatten()).filter_map(|s| match s {
        Stmt::Instr(i) if i.opcode != "call" => Some(&i.operands),
        _ => None,
    });
    let in_code = in_code.flatten().filter_map(|o| named(o, by_name));
    let mut seen = HashSet::new();
    in_variables.chain(in_code).filter(|f| !f.entry && seen.insert(f.name.as_str())).collect()
}

/// Functions that `entry` may reach, callees before callers, `entry` last. No recursion: chains may be long.
fn reachable<'a>(entry: &'a Func, by_name: &HashMap<&str, &'a Func>, taken: &[&'a Func]) -> Vec<&'a Func> {
    // The functions that `f` names, and whether it calls through a pointer.
    let callees = |f: &'a Func| {
        let (mut out, mut through_pointer) = (Vec::new(), false);
        for s in f.body.iter().flatten() {
            if let Stmt::Instr(i) = s {
                out.extend(i.operands.iter().filter_map(|o| named(o, by_name)));
                let through_register = |o: &Operand| matches!(o, Operand::Name(n) if n.starts_with('%'));
                through_pointer |= i.opcode == "call" && i.operands.iter().take(2).any(through_register);
            }
        }
        (out.into_iter(), through_pointer)
    };
    let (mut order, mut seen) = (Vec::new(), HashSet::from([entry.name.as_str()]));
    let mut stack = vec![(entry, callees(entry))];
    // One walk over `taken` for all callers: whatever one of them has passed is seen.
    let mut taken = taken.iter().copied();
    while let Some((f, (rest, through_pointer))) = stack.last_mut() {
        match rest.next().or_else(|| if *through_pointer { taken.next() } else { None }) {
            Some(next) => {
                if seen.insert(next.name.as_str()) {
                    stack.push((next, callees(next)));
                }
            }
            None => {
                order.push(*f);
                stack.pop();
            }
        }
    }
    order
}

/// Compiles one kernel; `order` are the functions that it may reach, itself the last.
fn kernel(
    entry: &Func,
    order: &[&Func],
    tree: &Module,
    numbers: &HashMap<&str, u32>,
    arch: &Arch,
    globals: &HashMap<String, u64>,
    const_bytes: u32,
) -> Result<Program> {
    let mut indices: HashMap<&str, u32> = order.iter().enumerate().map(|(i, f)| (f.name.as_str(), i as u32)).collect();
    for (alias, target) in &tree.aliases {
        if let Some(i) = indices.get(target.as_str()).copied() {
            indices.insert(alias, i);
        }
    }
    let shared_vars = tree.vars.iter().filter(|v| v.space == Space::Shared).map(|v| (v.name.as_str(), v)).collect();
    let mut unit = Unit {
        arch,
        tree,
        globals,
        shared_vars,
        indices,
        numbers,
        shared: HashMap::new(),
        shared_bytes: 0,
        dynamic_align: 16,
        code: Vec::new(),
        targets: 0,
        source: Vec::new(),
        texts: Vec::new(),
    };
    let (params, param_bytes) = kernel_params(entry)?;
    let mut funcs: Vec<FuncInfo> = Vec::new();
    for f in order {
        funcs.push(body::function(&mut unit, f, &params)?);
        if unit.code.len() > MAX_CODE {
            return Err(LoadError::new(f.line, &f.name, format!("the kernel has more than {MAX_CODE} instructions")));
        }
    }
    let pointers = order.iter().enumerate().map(|(i, f)| (numbers[f.name.as_str()], i as u32)).collect();
    // Nominal: only the assembler knows.
    let registers = 32;
    let local_bytes = funcs.iter().map(|f| f.local_bytes).max().unwrap_or(0);
    let mut program = Program {
        name: entry.name.clone(),
        params,
        param_bytes,
        static_shared: unit.shared_bytes as u32,
        local_bytes,
        const_bytes,
        registers: entry.attributes.maxnreg.map_or(registers, |m| registers.min(m)),
        attributes: entry.attributes.clone(),
        ptx_version: tree.version.0 * 10 + tree.version.1,
        async_reads: unit.code.iter().any(|i| match &i.kind {
            Kind::Wgmma(_) => true,
            Kind::Bulk(b) => !b.to_shared || b.shared_both,
            _ => false,
        }),
        product_lines: Vec::new(),
        code: unit.code,
        source: unit.source,
        texts: unit.texts,
        pointers,
        entry: funcs.len() as u32 - 1,
        funcs,
        dynamic_align: unit.dynamic_align,
    };
    program.product_lines = product_lines(&program.code, &program.funcs, |pc| program.is_move(pc as u32));
    Ok(program)
}

/// Lays kernel parameters out as the driver does: each at its own alignment.
fn kernel_params(entry: &Func) -> Result<(Vec<Param>, u32)> {
    let (mut out, mut offset) = (Vec::new(), 0u64);
    for v in &entry.params {
        let bytes = if v.is_array { v.bytes() } else { u64::from(v.ty.bytes()) };
        let align = v.align.max(1);
        offset = offset.next_multiple_of(align.into());
        if offset.saturating_add(bytes) > u64::from(MAX_PARAM_BYTES) {
            let message = format!("more than {MAX_PARAM_BYTES} bytes of kernel parameters");
            return Err(LoadError::new(v.line, &v.name, message));
        }
        out.push(Param { name: v.name.clone(), offset: offset as u32, bytes: bytes as u32, align });
        offset += bytes;
    }
    Ok((out, offset as u32))
}
