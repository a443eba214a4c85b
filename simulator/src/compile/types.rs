//! Which types each instruction may have, by the PTX ISA. Whatever is not in this table is refused before anything
//! chooses an operation by its type.

use super::Result;
use super::body::Body;

/// Modifiers that are types of operands.
const TYPES: &str = "pred b8 b16 b32 b64 b128 u8 u16 u32 u64 s8 s16 s32 s64 u16x2 s16x2 f16 f16x2 bf16 bf16x2 tf32 f32 \
                     f32x2 f64 e4m3x2 e5m2x2 e2m1x2 e2m3x2 e3m2x2 e4m3x4 e5m2x4 e2m1x4 e2m3x4 e3m2x4 ue8m0x2";

const INT: &str = "u16 u32 u64 s16 s32 s64";
const INT32_64: &str = "u32 u64 s32 s64";
const BITS: &str = "b16 b32 b64";
const ALL: &str = "b16 b32 b64 u16 u32 u64 s16 s32 s64 f32 f64";
const FLOAT: &str = "f16 f16x2 bf16 bf16x2 f32 f64";
const FLOAT_PAIR: &str = "f16 f16x2 bf16 bf16x2 f32 f32x2 f64";
const HALF: &str = "f16 bf16";
const F8X2: &str = "e4m3x2 e5m2x2";
const CONVERTED: &str = "u8 u16 u32 u64 s8 s16 s32 s64 f16 bf16 f32 f64";
const IN_MEMORY: &str = "b8 b16 b32 b64 b128 u8 u16 u32 u64 s8 s16 s32 s64 f32 f64";
const VIDEO: &str = "u32 s32";

/// Opcodes, each perhaps with a modifier that it must have, and the types allowed in each place.
const TABLE: &[(&str, &[&str])] = &[
    // Integers.
    ("add min max", &["u16x2 s16x2"]),
    ("add sub div rem min max sad", &[INT]),
    ("mul.lo mul.hi mad.lo mad.hi", &[INT]),
    ("mul.wide mad.wide", &["u16 u32 s16 s32"]),
    ("mul24 mad24", &["u32 s32"]),
    ("addc subc madc", &[INT32_64]),
    ("abs neg", &["s16 s32 s64"]),
    ("bfind bfe", &[INT32_64]),
    ("szext", &["u32 s32"]),
    ("dp4a dp2a", &["u32 s32", "u32 s32"]),
    ("vadd2 vsub2 vavrg2 vabsdiff2 vmin2 vmax2", &[VIDEO, VIDEO, VIDEO]),
    ("vadd4 vsub4 vavrg4 vabsdiff4 vmin4 vmax4", &[VIDEO, VIDEO, VIDEO]),
    // Bits.
    ("and or xor not", &["pred b16 b32 b64"]),
    ("cnot shl", &[BITS]),
    ("shr", &["b16 b32 b64 u16 u32 u64 s16 s32 s64"]),
    ("popc clz brev bfi", &["b32 b64"]),
    ("shf lop3 prmt bmsk fns", &["b32"]),
    // Floating point.
    ("add sub mul fma", &[FLOAT_PAIR]),
    ("add sub fma", &["f32", HALF]),
    ("min max abs neg", &[FLOAT]),
    ("mad div rcp sqrt rsqrt testp copysign", &["f32 f64"]),
    ("sin cos lg2", &["f32"]),
    ("ex2 tanh", &["f16 f16x2 bf16 bf16x2 f32"]),
    // Moves, selection, comparisons.
    ("mov", &["pred b16 b32 b64 b128 u16 u32 u64 s16 s32 s64 f32 f64"]),
    ("selp", &[ALL]),
    ("slct", &[ALL, "s32 f32"]),
    ("setp", &["b16 b32 b64 u16 u32 u64 s16 s32 s64 f16 f16x2 bf16 bf16x2 f32 f64"]),
    ("set", &["u32 s32 f32", ALL]),
    ("set", &["f16 bf16", "b16 b32 b64 u16 u32 u64 s16 s32 s64 f16 bf16 f32 f64"]),
    ("set", &["u16 s16 u32 s32", HALF]),
    ("set", &["u32 s32 f16x2", "f16x2"]),
    ("set", &["u32 s32 bf16x2", "bf16x2"]),
    ("cvta mapa getctarank", &["u32 u64"]),
    // Conversions.
    ("cvt", &[CONVERTED, CONVERTED]),
    ("cvt", &["tf32 f16x2 bf16x2 e4m3x2 e5m2x2", "f32"]),
    ("cvt", &[F8X2, "f16x2 bf16x2"]),
    ("cvt", &["f16x2", F8X2]),
    ("cvt.pack", &["u8 s8", "s32", "b32"]),
    // Memory.
    ("ld ldu st", &[IN_MEMORY]),
    ("atom.add red.add", &["u32 u64 s32 s64 f16 f16x2 bf16 bf16x2 f32 f64"]),
    ("atom.min atom.max red.min red.max", &["u32 u64 s32 s64 f16 f16x2 bf16 bf16x2"]),
    ("atom.and atom.or atom.xor red.and red.or red.xor", &["b32 b64"]),
    ("atom.exch", &["b32 b64 b128"]),
    ("atom.cas", &["b16 b32 b64 b128"]),
    ("atom.inc atom.dec red.inc red.dec", &["u32"]),
    // The warp.
    ("shfl", &["b32"]),
    ("vote.ballot", &["b32"]),
    ("vote.all vote.any vote.uni", &["pred"]),
    ("match", &["b32 b64"]),
    ("redux.add", &["u32 s32"]),
    ("redux.min redux.max", &["u32 s32 f32"]),
    ("redux.and redux.or redux.xor", &["b32"]),
    ("activemask", &["b32"]),
    ("nanosleep", &["u32"]),
    ("bar.sync bar.arrive barrier.sync barrier.arrive barrier.wait", &[]),
    ("bar.popc barrier.popc", &["u32"]),
    ("bar.and bar.or barrier.and barrier.or", &["pred"]),
    ("createpolicy", &["b64"]),
];

fn is_in(name: &str, list: &str) -> bool {
    list.split(' ').any(|x| x == name)
}

impl Body<'_, '_> {
    /// Refuses types that do not go with the instruction. Opcodes that are not in the table look at their types
    /// themselves, as far as they have any.
    pub(super) fn check_types(&self) -> Result<()> {
        let (opcode, mods) = (self.instr.opcode.as_str(), &self.instr.mods);
        let about = |row: &&(&str, &[&str])| {
            row.0.split(' ').any(|name| match name.split_once('.') {
                Some((base, modifier)) => base == opcode && mods.iter().any(|m| m == modifier),
                None => name == opcode,
            })
        };
        let types: Vec<&str> = mods.iter().map(String::as_str).filter(|m| is_in(m, TYPES)).collect();
        let fits = |places: &[&str]| {
            places.len() == types.len() && places.iter().zip(&types).all(|(allowed, ty)| is_in(ty, allowed))
        };
        if TABLE.iter().filter(about).any(|row| fits(row.1)) {
            return Ok(());
        }
        let listed = |name: &str| name.split_once('.').map_or(name, |n| n.0) == opcode;
        if !TABLE.iter().any(|row| row.0.split(' ').any(listed)) {
            return Ok(());
        }
        let dotted = |list: &str| list.split(' ').map(|t| format!(".{t}")).collect::<Vec<_>>().join(" ");
        let choices: Vec<String> = TABLE
            .iter()
            .filter(about)
            .map(|row| row.1.iter().map(|allowed| dotted(allowed)).collect::<Vec<_>>().join(" with "))
            .collect();
        let has = if types.is_empty() { "no type".to_owned() } else { dotted(&types.join(" ")) };
        if choices.is_empty() {
            return self.fail(format!("`{opcode}` with {has} lacks a modifier that says what it does"));
        }
        self.fail(format!("`{opcode}` does not go with {has}; it has {}", choices.join(", or ")))
    }
}
