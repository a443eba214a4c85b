//! The kinds of instructions that the executor runs itself, with their operands.

/// Where an address points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Generic,
    Global,
    Shared,
    Local,
    /// Kernel parameters.
    Param,
}

/// How an access takes part in synchronisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Strength {
    Weak,
    /// Volatile, relaxed.
    Strong,
    Acquire,
    Release,
    AcqRel,
}

#[derive(Debug, Clone)]
pub(crate) struct Access {
    pub place: Place,
    pub store: bool,
    /// Bytes of one element.
    pub bytes: u32,
    /// Sign-extend loaded elements.
    pub signed: bool,
    /// Registers of the elements with their words (1, 2 or [`HALF`]); offset `NONE` is a sink.
    pub regs: Vec<(u32, u32)>,
    pub address: Addr,
    pub strength: Strength,
    /// Whether the scope, of one that is not weak, is wider than a block.
    pub wide: bool,
}

/// `[register + offset]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Addr {
    pub reg: u32,
    pub wide: bool,
    pub offset: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AtomOp {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
    Exch,
    Cas,
    Inc,
    Dec,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AtomTy {
    Unsigned,
    Signed,
    F32,
    F64,
    F16,
    F16x2,
    Bf16,
    Bf16x2,
}

#[derive(Debug, Clone)]
pub(crate) struct Atom {
    pub place: Place,
    pub op: AtomOp,
    pub ty: AtomTy,
    pub bytes: u32,
    pub address: Addr,
    /// Per element: destination (`NONE` for `red`), operand, second operand of `cas`.
    pub elements: Vec<(u32, u32, u32)>,
    pub strength: Strength,
    /// Whether the scope is wider than a block.
    pub wide: bool,
    pub ftz: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shuffle {
    Up,
    Down,
    Bfly,
    Idx,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Vote {
    All,
    Any,
    Uni,
    Ballot,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reduce {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
    MinF,
    MaxF,
}

/// Operand types of matrix products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MatTy {
    F16,
    Bf16,
    Tf32,
    F32,
    F64,
    S8,
    U8,
    S4,
    U4,
    B1,
    S32,
    E4m3,
    E5m2,
}

impl MatTy {
    pub(crate) fn bits(self) -> u32 {
        match self {
            MatTy::B1 => 1,
            MatTy::S4 | MatTy::U4 => 4,
            MatTy::S8 | MatTy::U8 | MatTy::E4m3 | MatTy::E5m2 => 8,
            MatTy::F16 | MatTy::Bf16 => 16,
            MatTy::Tf32 | MatTy::F32 | MatTy::S32 => 32,
            MatTy::F64 => 64,
        }
    }
    /// The rate that products of this type are counted against, with sums of type `sums`.
    pub(crate) fn kind(self, sums: MatTy) -> &'static str {
        match self {
            MatTy::F16 if sums == MatTy::F16 => "16-bit with 16-bit sums",
            MatTy::E4m3 | MatTy::E5m2 if sums == MatTy::F16 => "8-bit with 16-bit sums",
            MatTy::F16 | MatTy::Bf16 => "16-bit",
            MatTy::Tf32 | MatTy::F32 | MatTy::S32 => "tf32",
            MatTy::F64 => "f64",
            MatTy::S8 | MatTy::U8 => "int8",
            MatTy::S4 | MatTy::U4 => "int4",
            MatTy::B1 => "1-bit",
            _ => "8-bit",
        }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Mma {
    pub m: u32,
    pub n: u32,
    pub k: u32,
    pub a_ty: MatTy,
    pub b_ty: MatTy,
    pub c_ty: MatTy,
    pub d_ty: MatTy,
    pub satfinite: bool,
    /// `.and.popc` instead of `.xor.popc`, for single bits.
    pub and_popc: bool,
    pub d: Vec<u32>,
    pub a: Vec<u32>,
    pub b: Vec<u32>,
    pub c: Vec<u32>,
}

#[derive(Debug, Clone)]
pub(crate) struct Wgmma {
    pub n: u32,
    pub k: u32,
    pub a_ty: MatTy,
    pub b_ty: MatTy,
    pub d_ty: MatTy,
    pub d: Vec<u32>,
    /// Registers of A, or empty when `a_desc` is used.
    pub a: Vec<u32>,
    pub a_desc: u32,
    pub b_desc: u32,
    /// Word offset of the scale-d predicate, with negation.
    pub scale_d: (u32, bool),
    pub negate_a: bool,
    pub negate_b: bool,
    pub trans_a: bool,
    pub trans_b: bool,
    pub saturate: bool,
}

/// Counts of a barrier.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bar {
    pub id: u32,
    /// Register with the number of threads, `NONE` for all.
    pub count: u32,
    pub arrive_only: bool,
    pub aligned: bool,
    /// `bar.red`: 0 none, 1 popc, 2 and, 3 or; result and source predicate.
    pub reduce: u32,
    pub d: u32,
    pub source: (u32, bool),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MbarOp {
    Init,
    Inval,
    Arrive,
    ArriveDrop,
    ExpectTx,
    CompleteTx,
    Test,
    Try,
    Pending,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Mbar {
    pub op: MbarOp,
    pub place: Place,
    pub address: Addr,
    /// State register (64-bit) written by arrive, predicate written by waits; `NONE` for a sink.
    pub d: u32,
    /// Count, or the state or parity waited for; `NONE` is 1.
    pub count: u32,
    /// `arrive.expect_tx`: bytes expected.
    pub tx: u32,
    pub parity: bool,
}

#[derive(Debug, Clone)]
pub(crate) struct CpAsync {
    pub dst: Addr,
    pub src: Addr,
    pub bytes: u32,
    /// Register with the bytes to read (the rest is zeroed), or `NONE`.
    pub src_bytes: u32,
    /// Predicate (with negation) that zeroes everything, or `NONE`.
    pub ignore: (u32, bool),
}

#[derive(Debug, Clone)]
pub(crate) struct Bulk {
    pub to_shared: bool,
    /// Destination of loads, source of stores.
    pub shared: Addr,
    /// The other side, or the tensor map.
    pub global: Addr,
    /// Register with the bytes of a plain copy.
    pub size: u32,
    /// Registers of a tensor copy's coordinates.
    pub coords: Vec<u32>,
    pub tensor: bool,
    pub mbar: Option<Addr>,
    /// `cp.reduce.async.bulk`: operation, type and bytes of an element.
    pub reduce: Option<(AtomOp, AtomTy, u32)>,
    /// From shared memory to shared memory.
    pub shared_both: bool,
}

#[derive(Debug, Clone)]
pub(crate) enum Kind {
    Alu,
    Nop,
    Jump(u32),
    Switch(Box<[u32]>),
    Call(Box<Call>),
    Ret,
    Exit,
    Trap(&'static str),
    /// `ld.param` of a kernel at a known offset.
    LoadParam {
        offset: u32,
        bytes: u32,
        signed: bool,
        words: u32,
    },
    Access(Box<Access>),
    Atom(Box<Atom>),
    /// A fence of memory: whether it is one between the generic and the asynchronous proxy of shared memory too, and whether its scope is
    /// wider than a block.
    Fence {
        proxy: bool,
        wide: bool,
    },
    Bar(Box<Bar>),
    WarpBar,
    Shuffle {
        mode: Shuffle,
        pred: u32,
    },
    Vote {
        op: Vote,
        source: (u32, bool),
    },
    Match {
        all: bool,
        wide: bool,
        pred: u32,
    },
    Redux {
        op: Reduce,
        signed: bool,
        absolute: bool,
        nan: bool,
    },
    Elect {
        pred: u32,
    },
    ActiveMask,
    LdMatrix {
        regs: Box<[u32]>,
        trans: bool,
        address: Addr,
        place: Place,
    },
    StMatrix {
        regs: Box<[u32]>,
        trans: bool,
        address: Addr,
        place: Place,
    },
    MovMatrix,
    Mma(Box<Mma>),
    Wgmma(Box<Wgmma>),
    WgmmaFence,
    /// `wgmma.commit_group`.
    WgmmaCommit,
    /// `wgmma.wait_group`: groups that may go on.
    WgmmaWait(u32),
    Mbar(Box<Mbar>),
    CpAsync(Box<CpAsync>),
    CpCommit,
    CpWait(u32),
    CpWaitAll,
    CpMbarArrive {
        address: Addr,
        place: Place,
        no_increment: bool,
    },
    Bulk(Box<Bulk>),
    BulkCommit,
    BulkWait(u32),
    /// `tensormap.replace`: byte offset and size of the field.
    MapReplace {
        address: Addr,
        place: Place,
        field: u32,
        bytes: u32,
    },
    /// `tensormap.cp_fenceproxy`: global, shared.
    MapCopy {
        dst: Addr,
        src: Addr,
    },
    Clock {
        wide: bool,
    },
    Yield,
    IsSpace(Place),
}

#[derive(Debug, Clone)]
pub(crate) struct Call {
    /// Index of the function, or `None` for a call through the register in `pointer`.
    pub func: Option<u32>,
    pub pointer: u32,
    /// Arguments and results: places in the caller's frame, in order.
    pub args: Vec<Slot>,
    pub returns: Vec<Slot>,
}

/// A value passed to or from a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Slot {
    /// Word offset and words.
    Reg(u32, u32),
    /// Byte offset in the frame's local memory and bytes.
    Local(u32, u32),
    Pred(u32),
}
