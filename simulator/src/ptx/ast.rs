//! The tree that the reader makes of a module.

/// Element types of registers and variables, by size and by how they are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Ty {
    Pred,
    B8,
    B16,
    B32,
    B64,
    B128,
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    F16,
    F16x2,
    Bf16,
    Bf16x2,
    F32,
    F64,
}

impl Ty {
    /// The type written as `name`, without the dot.
    pub(crate) fn parse(name: &str) -> Option<Ty> {
        Some(match name {
            "pred" => Ty::Pred,
            "b8" => Ty::B8,
            "b16" => Ty::B16,
            "b32" => Ty::B32,
            "b64" => Ty::B64,
            "b128" => Ty::B128,
            "u8" => Ty::U8,
            "u16" => Ty::U16,
            "u32" => Ty::U32,
            "u64" => Ty::U64,
            "s8" => Ty::S8,
            "s16" => Ty::S16,
            "s32" => Ty::S32,
            "s64" => Ty::S64,
            "f16" => Ty::F16,
            "f16x2" => Ty::F16x2,
            "bf16" => Ty::Bf16,
            "bf16x2" => Ty::Bf16x2,
            "f32" => Ty::F32,
            "f64" => Ty::F64,
            _ => return None,
        })
    }

    /// Size in bytes; a predicate counts as one.
    pub(crate) fn bytes(self) -> u32 {
        match self {
            Ty::Pred | Ty::B8 | Ty::U8 | Ty::S8 => 1,
            Ty::B16 | Ty::U16 | Ty::S16 | Ty::F16 | Ty::Bf16 => 2,
            Ty::B32 | Ty::U32 | Ty::S32 | Ty::F32 | Ty::F16x2 | Ty::Bf16x2 => 4,
            Ty::B64 | Ty::U64 | Ty::S64 | Ty::F64 => 8,
            Ty::B128 => 16,
        }
    }

    pub(crate) fn signed(self) -> bool {
        matches!(self, Ty::S8 | Ty::S16 | Ty::S32 | Ty::S64)
    }
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Operand {
    /// A register, variable, label, function or special register.
    Name(String),
    /// `!%p`
    Not(String),
    Int(i128),
    F32(u32),
    F64(u64),
    /// `{a, b}`
    Vector(Vec<Operand>),
    /// `[base + offset]` and, for tensor copies, `[base, {coordinates}]`.
    Address {
        base: Box<Operand>,
        offset: i64,
        more: Vec<Operand>,
    },
    /// `a|b`
    Pair(Box<Operand>, Box<Operand>),
    /// `(a, b)`
    List(Vec<Operand>),
    /// `name + offset`, the address of a variable.
    Sum(String, i64),
    /// `_`
    Sink,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Instr {
    pub line: u32,
    /// As written, without the semicolon.
    pub text: String,
    /// Predicate and whether it is negated.
    pub guard: Option<(String, bool)>,
    pub opcode: String,
    pub mods: Vec<String>,
    pub operands: Vec<Operand>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Space {
    Reg,
    Global,
    Const,
    Shared,
    Local,
    Param,
}

/// One initial value of a variable.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Init {
    Int(i128),
    F32(u32),
    F64(u64),
    Address { name: String, offset: i64 },
}

/// A declared variable or, in `Reg`, one register or a numbered family of them.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Var {
    pub line: u32,
    pub space: Space,
    pub name: String,
    pub ty: Ty,
    pub align: u32,
    /// Elements; 0 for `[]`.
    pub count: u64,
    pub is_array: bool,
    pub external: bool,
    /// `%r<7>`: registers `%r0` to `%r6`.
    pub family: Option<u64>,
    pub init: Vec<Init>,
}

impl Var {
    pub(crate) fn bytes(&self) -> u64 {
        self.count.saturating_mul(u64::from(self.ty.bytes()))
    }
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Stmt {
    Open,
    Close,
    Label(String, u32),
    Var(Var),
    Instr(Instr),
    /// `name: .branchtargets a, b;`
    Targets {
        name: String,
        labels: Vec<String>,
    },
    /// `name: .callprototype (ret) _ (params);`
    Prototype {
        name: String,
        returns: Vec<Var>,
        params: Vec<Var>,
    },
}

#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Attributes {
    pub maxntid: Option<[u32; 3]>,
    pub reqntid: Option<[u32; 3]>,
    pub maxnreg: Option<u32>,
    pub minnctapersm: Option<u32>,
    pub cluster: Option<[u32; 3]>,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Func {
    pub line: u32,
    pub name: String,
    pub entry: bool,
    pub returns: Vec<Var>,
    pub params: Vec<Var>,
    pub attributes: Attributes,
    /// `None` for a declaration.
    pub body: Option<Vec<Stmt>>,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Module {
    pub version: (u32, u32),
    pub target: String,
    pub vars: Vec<Var>,
    pub funcs: Vec<Func>,
    pub aliases: Vec<(String, String)>,
}
