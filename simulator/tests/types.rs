//! Every opcode with every type, right or wrong: refused with a sentence that names the instruction, or run without
//! touching any register but its destination.

mod common;
use common::Random;
use cuda_sim::{Arch, Device, LaunchConfig, Options};
use std::collections::{BTreeMap, BTreeSet};

const TYPES: [&str; 26] = [
    "pred", "b8", "b16", "b32", "b64", "b128", "u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64", "u16x2", "s16x2",
    "f16", "f16x2", "bf16", "bf16x2", "tf32", "f32", "f32x2", "f64", "e4m3x2", "e5m2x2",
];

/// Opcodes with the modifiers that they usually have (one of a list) and their operands: `d` and `s` of the type, `w` of
/// 32 bits, `p` a predicate, `q` a register and a predicate, `m` an address, `i` a number.
const OPCODES: &[(&str, &str, &str)] = &[
    ("add", " sat cc rn rz.ftz", "dss"),
    ("sub", " sat cc rn rm", "dss"),
    ("mul", "lo hi wide rn ", "dss"),
    ("mad", "lo hi wide rn lo.cc hi.sat", "dsss"),
    ("mul24", "lo hi", "dss"),
    ("mad24", "lo hi hi.sat", "dsss"),
    ("addc", " cc", "dss"),
    ("subc", " cc", "dss"),
    ("madc", "lo hi lo.cc", "dsss"),
    ("sad", "", "dsss"),
    ("div", " rn approx full.ftz", "dss"),
    ("rem", "", "dss"),
    ("abs", " ftz", "ds"),
    ("neg", " ftz", "ds"),
    ("min", " relu NaN ftz.xorsign.abs", "dss"),
    ("max", " relu NaN ftz", "dss"),
    ("fma", "rn rz rn.sat rn.relu", "dsss"),
    ("rcp", "rn approx.ftz", "ds"),
    ("sqrt", "rn approx", "ds"),
    ("rsqrt", "approx", "ds"),
    ("sin", "approx", "ds"),
    ("cos", "approx", "ds"),
    ("lg2", "approx", "ds"),
    ("ex2", "approx approx.ftz", "ds"),
    ("tanh", "approx", "ds"),
    ("copysign", "", "dss"),
    ("testp", "finite notanumber normal", "ps"),
    ("and", "", "dss"),
    ("or", "", "dss"),
    ("xor", "", "dss"),
    ("not", "", "ds"),
    ("cnot", "", "ds"),
    ("shl", "", "dsw"),
    ("shr", "", "dsw"),
    ("shf", "l.wrap r.clamp", "dssw"),
    ("lop3", " or", "dsssi"),
    ("popc", "", "ws"),
    ("clz", "", "ws"),
    ("brev", "", "ds"),
    ("bfind", " shiftamt", "ws"),
    ("bfe", "", "dsww"),
    ("bfi", "", "dssww"),
    ("bmsk", "clamp wrap", "dss"),
    ("szext", "clamp wrap", "dss"),
    ("prmt", " f4e rc16", "dsss"),
    ("fns", "", "dsss"),
    ("dp4a", "u32 s32", "wwww"),
    ("dp2a", "lo.u32 hi.s32", "wwww"),
    ("mov", "", "ds"),
    ("selp", "", "dssp"),
    ("slct", "s32 f32 b64 ftz.u16", "dssw"),
    ("setp", "lt ge hs num eq.and", "pss"),
    ("set", "lt.u32 eq.f32 ne.f16 gt.s16 le.f16x2 ge", "wss"),
    ("cvt", "rn.f32 rzi.s32 sat.u8 u64 rn.f16 rn.f64 rna.tf32 rn.bf16x2 rn.satfinite.e4m3x2", "ds"),
    ("cvt", "rn.f16x2 rn.satfinite.e5m2x2 pack.sat.u16 pack.sat.s8.s32", "wss"),
    ("cvta", "global to.shared local", "ds"),
    ("isspacep", "global shared", "ps"),
    ("vadd2", "u32.u32 s32.u32", "wwww"),
    ("vabsdiff4", "s32.s32.sat u32.s32", "wwww"),
    ("ld", "global  global.relaxed.gpu volatile", "dm"),
    ("st", "global  global.release.gpu", "ms"),
    ("ld", "global.v2 v4", "vm"),
    ("st", "global.v2 v4", "mv"),
    ("atom", "global.add min global.and or.gpu exch inc", "dms"),
    ("atom", "global.cas cas", "dmss"),
    ("red", "global.add max xor", "ms"),
    ("shfl", "sync.idx sync.bfly", "dswww"),
    ("vote", "sync.ballot", "wpw"),
    ("vote", "sync.all sync.any", "ppw"),
    ("match", "any.sync", "wsw"),
    ("match", "all.sync", "qsw"),
    ("redux", "sync.add sync.min sync.xor", "dsw"),
    ("elect", "sync", "qw"),
    ("activemask", "", "d"),
    ("nanosleep", "", "s"),
    ("bar", "red.popc red.and", "dip"),
    ("mapa", "shared::cluster", "dsw"),
    ("createpolicy", "fractional.L2::evict_last", "d"),
    ("movmatrix", "sync.aligned.m8n8.trans", "ds"),
    ("ldmatrix", "sync.aligned.m8n8.x2.shared", "vm"),
];

/// Registers by their bytes; two of each.
const REGISTERS: [(&str, &str, u32); 6] =
    [("%h", "b16", 2), ("%r", "b32", 4), ("%rd", "b64", 8), ("%f", "f32", 4), ("%fd", "f64", 8), ("%p", "pred", 0)];

fn bytes(ty: &str) -> u32 {
    match ty {
        "pred" => 0,
        "b8" | "u8" | "s8" | "b16" | "u16" | "s16" | "f16" | "bf16" | "e4m3x2" | "e5m2x2" => 2,
        "b64" | "u64" | "s64" | "f32x2" | "f64" => 8,
        _ => 4,
    }
}

fn register(random: &mut Random, bytes: u32) -> String {
    let fitting: Vec<_> = REGISTERS.iter().filter(|r| r.2 == bytes).collect();
    let of = if random.below(8) == 0 || fitting.is_empty() {
        &REGISTERS[random.below(6) as usize]
    } else {
        fitting[random.below(fitting.len() as u32) as usize]
    };
    format!("{}{}", of.0, random.below(2))
}

fn operand(random: &mut Random, shape: char, ty: &str) -> String {
    match shape {
        'd' => register(random, bytes(ty)),
        's' if random.below(6) == 0 => {
            ["7", "0f3F800000", "0d4000000000000000", "%tid.x", "g", "-1"][random.below(6) as usize].to_owned()
        }
        's' => register(random, bytes(ty)),
        'w' => register(random, 4),
        'p' => register(random, 0),
        'q' => format!("{}|{}", register(random, 4), register(random, 0)),
        'v' => {
            let n = [2, 4][random.below(2) as usize];
            let parts: Vec<String> = (0..n).map(|_| register(random, bytes(ty))).collect();
            format!("{{{}}}", parts.join(", "))
        }
        'm' => "[%at]".to_owned(),
        _ => random.below(256).to_string(),
    }
}

/// What a register starts as, and stays.
fn value(k: u32, n: u32) -> u64 {
    match REGISTERS[k as usize].2 {
        0 => u64::from(n),
        2 => u64::from(0x3c00 + 16 * k + n),
        4 => u64::from(0x3f80_0000 + 16 * k + n),
        _ => 0x3ff0_0000_0000_0000 + u64::from(16 * k + n),
    }
}

/// The kernel: sets all registers, runs the instruction, writes all registers that it does not name first.
fn text(instruction: &str, first: &str) -> (String, u32, Vec<(u32, u32)>) {
    let mut t = String::from(
        ".version 8.7\n.target sm_120\n.address_size 64\n.global .align 16 .b8 g[256];\n.visible .entry k(.param .u64 out) {\n.reg .b64 %out, %at; .reg .b32 %word;\n",
    );
    for (name, ty, _) in REGISTERS {
        t += &format!(".reg .{ty} {name}<2>;\n");
    }
    t += "ld.param.u64 %out, [out];\nmov.u64 %at, g;\n";
    let mut kept = Vec::new();
    for n in 0..2 {
        for (k, (name, ty, bytes)) in REGISTERS.iter().enumerate() {
            let v = value(k as u32, n);
            t += &match *bytes {
                0 => format!("setp.ne.u32 {name}{n}, {n}, 0;\n"),
                _ if *ty == "f32" => format!("mov.b32 {name}{n}, {v:#x};\n"),
                b => format!("mov.b{} {name}{n}, {v:#x};\n", 8 * b),
            };
            let named = first.split(|c: char| !(c.is_alphanumeric() || c == '%')).any(|w| w == format!("{name}{n}"));
            if !named {
                kept.push((k as u32, n));
            }
        }
    }
    t += &format!("{instruction};\n");
    let line = t.lines().count() as u32;
    for (i, (k, n)) in kept.iter().enumerate() {
        let (name, ty, bytes) = REGISTERS[*k as usize];
        t += &match bytes {
            0 => format!("selp.b32 %word, 1, 0, {name}{n};\nst.global.u32 [%out+{}], %word;\n", 8 * i),
            2 => format!("cvt.u32.u16 %word, {name}{n};\nst.global.u32 [%out+{}], %word;\n", 8 * i),
            _ => format!("st.global.{ty} [%out+{}], {name}{n};\n", 8 * i),
        };
    }
    (t + "ret;\n}\n", line, kept)
}

/// Whether it was loaded.
fn one(instruction: &str, first: &str) -> bool {
    let (text, line, kept) = text(instruction, first);
    let device = Device::new(Arch::SM_120, Options { threads: 1, budget: 10_000, ..Options::default() });
    let module = match device.load_module(&text) {
        Ok(module) => module,
        Err(e) => {
            assert_eq!((e.line, e.text.as_str()), (line, instruction), "{e}");
            assert!(e.message.contains(' ') && !e.message.contains("fault of the simulator"), "{e}");
            return false;
        }
    };
    let out = device.alloc(8 * 16).unwrap();
    device.memset(out, &[0], 8 * 16).unwrap();
    let config = LaunchConfig::new([1; 3], [32, 1, 1]);
    match device.launch(&module.function("k").unwrap(), &config, &out.to_le_bytes()) {
        Ok(_) => {}
        // A read of memory that nobody wrote, an address that is none.
        Err(fault) => {
            assert!(!fault.text.contains("simulator itself"), "{instruction}: {fault}");
            return true;
        }
    }
    let mut raw = vec![0; 8 * kept.len()];
    device.read(out, &mut raw).unwrap();
    for ((k, n), b) in kept.iter().zip(raw.chunks_exact(8)) {
        let found = u64::from_le_bytes(b.try_into().unwrap());
        assert_eq!(found, value(*k, *n), "{instruction} changes {}{n}", REGISTERS[*k as usize].0);
    }
    true
}

#[test]
fn every_opcode_with_every_type() {
    let mut random = Random(1);
    let mut loaded: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    let extra =
        ["ftz", "sat", "rn", "rz", "hi", "wide", "cc", "relu", "approx", "v2", "x2", "f16", "u32", "b64", "sync"];
    for (opcode, modifiers, shape) in OPCODES {
        let modifiers: Vec<&str> = modifiers.split(' ').collect();
        for ty in TYPES {
            for _ in 0..10 {
                let mut mods = vec![modifiers[random.below(modifiers.len() as u32) as usize]];
                if random.below(5) == 0 {
                    mods.push(extra[random.below(extra.len() as u32) as usize]);
                }
                mods.push(ty);
                if random.below(6) == 0 {
                    mods.push(TYPES[random.below(26) as usize]);
                }
                mods.retain(|m| !m.is_empty());
                let operands: Vec<String> = shape.chars().map(|s| operand(&mut random, s, ty)).collect();
                let instruction = format!("{opcode}.{} {}", mods.join("."), operands.join(", "));
                if one(&instruction, &operands[0]) {
                    loaded.entry(opcode).or_default().insert(ty);
                }
            }
        }
    }
    for (opcode, ..) in OPCODES {
        let untyped = ["isspacep", "elect", "createpolicy", "movmatrix", "ldmatrix"];
        assert!(loaded.contains_key(opcode) || untyped.contains(opcode), "{opcode} was never loaded");
    }
    // What the table of types is for.
    for (opcode, types) in [
        ("shl", "b16 b32 b64"),
        ("popc", "b32 b64"),
        ("lop3", "b32"),
        ("rem", "s16 s32 s64 u16 u32 u64"),
        ("fma", "bf16 bf16x2 f16 f16x2 f32 f32x2 f64"),
        ("selp", "b16 b32 b64 f32 f64 s16 s32 s64 u16 u32 u64"),
        ("sin", "f32"),
    ] {
        let found: Vec<&str> = loaded[opcode].iter().copied().collect();
        assert_eq!(found.join(" "), types, "{opcode}");
    }
}

#[test]
fn the_refusal_says_what_is_allowed() {
    let (text, ..) = text("shl.bf16 %h0, %h1, %r0", "%h0");
    let device = Device::new(Arch::SM_120, Options::default());
    let e = device.load_module(&text).err().unwrap();
    assert_eq!(e.message, "`shl` does not go with .bf16; it has .b16 .b32 .b64");
}
