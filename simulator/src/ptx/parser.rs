//! Tokens to the tree. Loops, no recursion beyond three levels of operands: hostile text cannot exhaust the stack.

use super::ast::*;
use super::lexer::{Tok, Token, tokens};
use crate::error::LoadError;

/// Longest text that is read, bytes.
const MAX_TEXT: usize = 256 << 20;

type Result<T> = std::result::Result<T, LoadError>;

/// Reads a whole module.
pub(crate) fn parse(text: &str) -> Result<Module> {
    if text.len() > MAX_TEXT {
        return Err(LoadError::new(0, "", format!("the text has {} bytes, more than {MAX_TEXT}", text.len())));
    }
    let tokens = tokens(text)?;
    let mut p = Parser { text, tokens, i: 0 };
    p.module()
}

struct Parser<'a> {
    text: &'a str,
    tokens: Vec<Token<'a>>,
    i: usize,
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Tok<'a> {
        self.tokens[self.i].tok
    }
    fn line(&self) -> u32 {
        self.tokens[self.i].line
    }
    fn next(&mut self) -> Tok<'a> {
        let t = self.peek();
        if t != Tok::End {
            self.i += 1;
        }
        t
    }
    fn eat(&mut self, c: u8) -> bool {
        let hit = self.peek() == Tok::Punct(c);
        if hit {
            self.i += 1;
        }
        hit
    }
    fn fail<T>(&self, message: impl Into<String>) -> Result<T> {
        let t = &self.tokens[self.i];
        let rest = &self.text[t.start..];
        let shown = rest.lines().next().unwrap_or("").trim_end();
        Err(LoadError::new(t.line, shown, message))
    }
    fn expect(&mut self, c: u8) -> Result<()> {
        if self.eat(c) { Ok(()) } else { self.fail(format!("expected `{}` here", c as char)) }
    }
    fn word(&mut self) -> Result<&'a str> {
        match self.peek() {
            Tok::Word(w) => {
                self.i += 1;
                Ok(w)
            }
            _ => self.fail("expected a name here"),
        }
    }
    fn integer(&mut self) -> Result<u64> {
        match self.peek() {
            Tok::Int(v) => {
                self.i += 1;
                Ok(v)
            }
            _ => self.fail("expected an integer here"),
        }
    }

    fn skip_line(&mut self) {
        let line = self.line();
        while self.line() == line && self.peek() != Tok::End {
            self.i += 1;
        }
    }

    fn skip_to_semicolon(&mut self) {
        while !matches!(self.next(), Tok::Punct(b';') | Tok::End) {}
    }

    fn skip_braces(&mut self) -> Result<()> {
        while self.peek() != Tok::Punct(b'{') {
            if self.next() == Tok::End {
                return self.fail("expected `{` before the end");
            }
        }
        let mut depth = 0u64;
        loop {
            match self.next() {
                Tok::Punct(b'{') => depth += 1,
                Tok::Punct(b'}') => depth -= 1,
                Tok::End => return self.fail("the section does not end"),
                _ => {}
            }
            if depth == 0 {
                return Ok(());
            }
        }
    }

    fn module(&mut self) -> Result<Module> {
        let mut m = Module::default();
        loop {
            match self.peek() {
                Tok::End => break,
                Tok::Punct(b';') => self.i += 1,
                Tok::Dot("version") => {
                    self.i += 1;
                    m.version = match self.next() {
                        Tok::F64(bits) => {
                            let v = f64::from_bits(bits);
                            (v as u32, ((v - v.floor()) * 10.0).round() as u32)
                        }
                        Tok::Int(v) => (v.min(99) as u32, 0),
                        _ => return self.fail("`.version` needs a number"),
                    };
                }
                Tok::Dot("target") => {
                    self.i += 1;
                    m.target = self.word()?.to_owned();
                    while self.eat(b',') {
                        self.word()?;
                    }
                }
                Tok::Dot("address_size") => {
                    self.i += 1;
                    if self.integer()? != 64 {
                        return self.fail("only 64-bit addresses are supported");
                    }
                }
                Tok::Dot("file" | "loc") => self.skip_line(),
                Tok::Dot("section") => self.skip_braces()?,
                Tok::Dot("pragma") => self.skip_to_semicolon(),
                Tok::Dot("alias") => {
                    self.i += 1;
                    let a = self.word()?.to_owned();
                    self.expect(b',')?;
                    m.aliases.push((a, self.word()?.to_owned()));
                    self.expect(b';')?;
                }
                Tok::Dot(_) => self.global(&mut m)?,
                _ => return self.fail("expected a directive at module level"),
            }
        }
        if m.target.is_empty() {
            return Err(LoadError::new(0, "", "this is not PTX: there is no `.target`"));
        }
        Ok(m)
    }

    fn global(&mut self, m: &mut Module) -> Result<()> {
        let mut external = false;
        loop {
            match self.peek() {
                Tok::Dot("visible" | "weak" | "common") => self.i += 1,
                Tok::Dot("extern") => {
                    external = true;
                    self.i += 1;
                }
                Tok::Dot("entry") => {
                    let f = self.func(true)?;
                    m.funcs.push(f);
                    return Ok(());
                }
                Tok::Dot("func") => {
                    let f = self.func(false)?;
                    m.funcs.push(f);
                    return Ok(());
                }
                Tok::Dot("global" | "const" | "shared") => {
                    self.var(external, &mut m.vars)?;
                    return Ok(());
                }
                _ => return self.fail("this directive is not supported"),
            }
        }
    }

    fn func(&mut self, entry: bool) -> Result<Func> {
        let line = self.line();
        self.i += 1;
        let mut attributes = Attributes::default();
        self.attributes(&mut attributes)?;
        let returns = if self.peek() == Tok::Punct(b'(') { self.params()? } else { Vec::new() };
        let name = self.word()?.to_owned();
        let params = if self.peek() == Tok::Punct(b'(') { self.params()? } else { Vec::new() };
        self.attributes(&mut attributes)?;
        let body = if self.eat(b';') {
            None
        } else {
            self.expect(b'{')?;
            Some(self.body()?)
        };
        Ok(Func { line, name, entry, returns, params, attributes, body })
    }

    fn attributes(&mut self, a: &mut Attributes) -> Result<()> {
        while let Tok::Dot(name) = self.peek() {
            let slot = match name {
                "maxntid" => Some(&mut a.maxntid),
                "reqntid" => Some(&mut a.reqntid),
                "reqnctapercluster" => Some(&mut a.cluster),
                _ => None,
            };
            self.i += 1;
            if let Some(slot) = slot {
                let mut dims = [1u32; 3];
                for (k, dim) in dims.iter_mut().enumerate() {
                    if k > 0 && !self.eat(b',') {
                        break;
                    }
                    *dim = u32::try_from(self.integer()?).or_else(|_| self.fail("this count is too large"))?;
                }
                *slot = Some(dims);
                continue;
            }
            match name {
                "maxnreg" => a.maxnreg = Some(self.integer()?.min(u64::from(u32::MAX)) as u32),
                "minnctapersm" => a.minnctapersm = Some(self.integer()?.min(u64::from(u32::MAX)) as u32),
                "maxnctapersm" | "maxclusterrank" | "abi_preserve" | "abi_preserve_control" => {
                    self.integer()?;
                }
                "noreturn" | "explicitcluster" | "blocksareclusters" => {}
                "pragma" => self.skip_to_semicolon(),
                "attribute" => while !matches!(self.next(), Tok::Punct(b')') | Tok::End) {},
                _ => {
                    self.i -= 1;
                    return self.fail("this directive is not supported");
                }
            }
        }
        Ok(())
    }

    fn params(&mut self) -> Result<Vec<Var>> {
        self.expect(b'(')?;
        let mut out = Vec::new();
        while !self.eat(b')') {
            if self.peek() == Tok::Punct(b'_') {
                self.i += 1;
            }
            self.declaration(false, &mut out, true)?;
            if !self.eat(b',') && self.peek() != Tok::Punct(b')') {
                return self.fail("expected `,` or `)` after a parameter");
            }
        }
        Ok(out)
    }

    /// Variables up to and with the semicolon.
    fn var(&mut self, external: bool, out: &mut Vec<Var>) -> Result<()> {
        self.declaration(external, out, false)?;
        self.expect(b';')
    }

    /// `.space .align N .type name[..] = init, name ...`; of a parameter list, one.
    fn declaration(&mut self, external: bool, out: &mut Vec<Var>, single: bool) -> Result<()> {
        let space = match self.next() {
            Tok::Dot("reg") => Space::Reg,
            Tok::Dot("global") => Space::Global,
            Tok::Dot("const") => Space::Const,
            Tok::Dot("shared") => Space::Shared,
            Tok::Dot("local") => Space::Local,
            Tok::Dot("param") => Space::Param,
            _ => {
                self.i -= 1;
                return self.fail("expected a state space such as `.reg` or `.param`");
            }
        };
        let (mut align, mut ty, mut vector) = (0u32, None, 1u64);
        while let Tok::Dot(d) = self.peek() {
            self.i += 1;
            match d {
                "align" => {
                    let v = self.integer()?;
                    if !v.is_power_of_two() || v > 4096 {
                        return self.fail("an alignment is a power of two up to 4096");
                    }
                    // `.ptr .global .align 1` speaks of what a parameter points to.
                    if ty.is_none() {
                        align = v as u32;
                    }
                }
                "v2" if space != Space::Reg => vector = 2,
                "v4" if space != Space::Reg => vector = 4,
                "ptr" | "global" | "shared" | "const" | "local" | "param" if ty.is_some() => {}
                "attribute" => while !matches!(self.next(), Tok::Punct(b')') | Tok::End) {},
                _ => match Ty::parse(d) {
                    Some(t) => ty = Some(t),
                    None => {
                        self.i -= 1;
                        return self.fail("this is not a type that variables can have");
                    }
                },
            }
        }
        let Some(ty) = ty else {
            return self.fail("this variable has no type");
        };
        loop {
            let line = self.line();
            // Prototypes may leave the name out.
            let name = match self.peek() {
                Tok::Word(w) => {
                    self.i += 1;
                    w.to_owned()
                }
                _ if single => String::new(),
                _ => return self.fail("expected the name of a variable"),
            };
            let mut v = Var {
                line,
                space,
                name,
                ty,
                align: align.max(ty.bytes() * vector as u32),
                count: vector,
                is_array: vector > 1,
                external,
                family: None,
                init: Vec::new(),
            };
            if space == Space::Param || align > 0 {
                v.align = if align > 0 { align } else { ty.bytes() };
            }
            if self.eat(b'<') {
                v.family = Some(self.integer()?);
                self.expect(b'>')?;
            }
            while self.eat(b'[') {
                v.is_array = true;
                let n = if self.peek() == Tok::Punct(b']') { 0 } else { self.integer()? };
                v.count = match v.count.checked_mul(n) {
                    Some(c) if c.checked_mul(16).is_some() => c,
                    _ => return self.fail("this array is too large"),
                };
                self.expect(b']')?;
            }
            if self.eat(b'=') {
                self.initialiser(&mut v)?;
            }
            out.push(v);
            if single || !self.eat(b',') {
                return Ok(());
            }
        }
    }

    fn initialiser(&mut self, v: &mut Var) -> Result<()> {
        let mut depth = 0u32;
        loop {
            if self.eat(b'{') {
                depth += 1;
                continue;
            }
            if depth > 0 && self.eat(b'}') {
                depth -= 1;
            } else {
                let item = self.init_value()?;
                v.init.push(item);
            }
            while depth > 0 && self.eat(b'}') {
                depth -= 1;
            }
            if depth == 0 {
                break;
            }
            self.expect(b',')?;
        }
        if v.is_array && v.count == 0 {
            v.count = v.init.len() as u64;
        }
        if v.init.len() as u64 > v.count {
            return self.fail("there are more initial values than elements");
        }
        Ok(())
    }

    fn init_value(&mut self) -> Result<Init> {
        let negative = self.eat(b'-');
        Ok(match self.next() {
            Tok::Int(i) => Init::Int(if negative { -i128::from(i) } else { i128::from(i) }),
            Tok::F32(b) => Init::F32(b ^ (u32::from(negative) << 31)),
            Tok::F64(b) => Init::F64(b ^ (u64::from(negative) << 63)),
            Tok::Word("generic") => {
                self.expect(b'(')?;
                let name = self.word()?.to_owned();
                let mut offset = self.offset()?;
                self.expect(b')')?;
                offset = offset.wrapping_add(self.offset()?);
                Init::Address { name, offset }
            }
            Tok::Word(w) => Init::Address { name: w.to_owned(), offset: self.offset()? },
            _ => {
                self.i -= 1;
                return self.fail("this initial value is not supported");
            }
        })
    }

    /// `+4`, `-4`, `+-4` or nothing.
    fn offset(&mut self) -> Result<i64> {
        let negative = if self.eat(b'+') {
            self.eat(b'-')
        } else if self.eat(b'-') {
            true
        } else {
            return Ok(0);
        };
        let v = self.integer()? as i64;
        Ok(if negative { v.wrapping_neg() } else { v })
    }

    fn body(&mut self) -> Result<Vec<Stmt>> {
        let (mut out, mut depth) = (Vec::new(), 1u32);
        loop {
            let line = self.line();
            match self.peek() {
                Tok::End => return self.fail("the function does not end"),
                Tok::Punct(b';') => self.i += 1,
                Tok::Punct(b'{') => {
                    self.i += 1;
                    depth += 1;
                    if depth > 1000 {
                        return self.fail("blocks are nested too deeply");
                    }
                    out.push(Stmt::Open);
                }
                Tok::Punct(b'}') => {
                    self.i += 1;
                    depth -= 1;
                    if depth == 0 {
                        return Ok(out);
                    }
                    out.push(Stmt::Close);
                }
                Tok::Dot("loc" | "file") => self.skip_line(),
                Tok::Dot("section") => self.skip_braces()?,
                Tok::Dot("pragma") => self.skip_to_semicolon(),
                Tok::Dot("maxnreg" | "local_maxnreg") => self.skip_to_semicolon(),
                Tok::Dot(_) => {
                    let mut vars = Vec::new();
                    self.var(false, &mut vars)?;
                    out.extend(vars.into_iter().map(Stmt::Var));
                }
                Tok::Word(w) if self.tokens[self.i + 1].tok == Tok::Punct(b':') => {
                    self.i += 2;
                    match self.peek() {
                        Tok::Dot("branchtargets" | "calltargets") => {
                            self.i += 1;
                            let mut labels = vec![self.word()?.to_owned()];
                            while self.eat(b',') {
                                labels.push(self.word()?.to_owned());
                            }
                            self.expect(b';')?;
                            out.push(Stmt::Targets { name: w.to_owned(), labels });
                        }
                        Tok::Dot("callprototype") => {
                            self.i += 1;
                            let returns = if self.peek() == Tok::Punct(b'(') { self.params()? } else { Vec::new() };
                            self.word()?;
                            let params = if self.peek() == Tok::Punct(b'(') { self.params()? } else { Vec::new() };
                            self.attributes(&mut Attributes::default())?;
                            self.expect(b';')?;
                            out.push(Stmt::Prototype { name: w.to_owned(), returns, params });
                        }
                        _ => out.push(Stmt::Label(w.to_owned(), line)),
                    }
                }
                Tok::Word(_) | Tok::Punct(b'@') => {
                    let instr = self.instr()?;
                    out.push(Stmt::Instr(instr));
                }
                _ => return self.fail("expected an instruction"),
            }
        }
    }

    fn instr(&mut self) -> Result<Instr> {
        let (line, start) = (self.line(), self.tokens[self.i].start);
        let guard = match self.eat(b'@') {
            true => {
                let negated = self.eat(b'!');
                Some((self.word()?.to_owned(), negated))
            }
            false => None,
        };
        let opcode = self.word()?.to_owned();
        let mut mods = Vec::new();
        while let Tok::Dot(m) = self.peek() {
            self.i += 1;
            mods.push(m.to_owned());
        }
        let mut operands = Vec::new();
        while self.peek() != Tok::Punct(b';') {
            operands.push(self.operand(0)?);
            if self.peek() != Tok::Punct(b';') {
                self.expect(b',')?;
            }
        }
        let end = self.tokens[self.i].start;
        self.i += 1;
        let text = self.text[start..end].split_whitespace().collect::<Vec<_>>().join(" ");
        Ok(Instr { line, text, guard, opcode, mods, operands })
    }

    fn operand(&mut self, depth: u32) -> Result<Operand> {
        let first = self.simple(depth)?;
        if self.eat(b'|') {
            let second = self.simple(depth)?;
            return Ok(Operand::Pair(Box::new(first), Box::new(second)));
        }
        Ok(first)
    }

    fn list(&mut self, close: u8, depth: u32) -> Result<Vec<Operand>> {
        if depth > 2 {
            return self.fail("operands are nested too deeply");
        }
        let mut out = Vec::new();
        while !self.eat(close) {
            out.push(self.operand(depth + 1)?);
            if !self.eat(b',') && self.peek() != Tok::Punct(close) {
                return self.fail(format!("expected `,` or `{}`", close as char));
            }
        }
        Ok(out)
    }

    fn simple(&mut self, depth: u32) -> Result<Operand> {
        let op = match self.next() {
            Tok::Word("_") => Operand::Sink,
            Tok::Word(w) => match self.peek() {
                Tok::Punct(b'+' | b'-') => {
                    let offset = self.offset()?;
                    Operand::Sum(w.to_owned(), offset)
                }
                _ => Operand::Name(w.to_owned()),
            },
            Tok::Int(v) => Operand::Int(i128::from(v)),
            Tok::F32(v) => Operand::F32(v),
            Tok::F64(v) => Operand::F64(v),
            Tok::Punct(b'!') => Operand::Not(self.word()?.to_owned()),
            Tok::Punct(sign @ (b'-' | b'~' | b'+')) => match (self.next(), sign) {
                (Tok::Int(v), b'-') => Operand::Int(-i128::from(v)),
                (Tok::Int(v), b'~') => Operand::Int(i128::from(!v as i64)),
                (Tok::Int(v), _) => Operand::Int(i128::from(v)),
                (Tok::F32(v), b'-') => Operand::F32(v ^ (1 << 31)),
                (Tok::F64(v), b'-') => Operand::F64(v ^ (1 << 63)),
                _ => {
                    self.i -= 1;
                    return self.fail("expected a number after the sign");
                }
            },
            Tok::Punct(b'{') => Operand::Vector(self.list(b'}', depth)?),
            Tok::Punct(b'(') => Operand::List(self.list(b')', depth)?),
            Tok::Punct(b'[') => {
                if depth > 2 {
                    return self.fail("operands are nested too deeply");
                }
                let base = self.simple(depth + 1)?;
                let (base, mut offset) = match base {
                    Operand::Sum(name, offset) => (Operand::Name(name), offset),
                    other => (other, 0),
                };
                offset = offset.wrapping_add(self.offset()?);
                let mut more = Vec::new();
                while self.eat(b',') {
                    more.push(self.operand(depth + 1)?);
                }
                self.expect(b']')?;
                Operand::Address { base: Box::new(base), offset, more }
            }
            _ => {
                self.i = self.i.saturating_sub(1);
                return self.fail("this is not an operand");
            }
        };
        Ok(op)
    }
}
