//! A table that other programs put their chains into, made by us so that it can be told from one that was
//! there: it has a comment.

use std::io;

use super::{
    BATCH_BEGIN, Batch, DELETE_TABLE, NEW_TABLE, NF_ACCEPT, SUBSYSTEM, batch_header, text,
};
use crate::netlink::{
    NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkSocket, attribute, attributes, message,
};

const GET_TABLE: u16 = 1;
const GET_CHAIN: u16 = 4;
const GET_RULE: u16 = 7;
const GET_SET: u16 = 10;
const GET_GENERATION: u16 = 16;

const NAME: u16 = 1;
const USER_DATA: u16 = 6;

/// How often removing is tried again when somebody else changed something meanwhile.
const ATTEMPTS: u32 = 10;

/// A family of tables that iptables or ip6tables uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IpFamily {
    V4,
    V6,
}

/// A table, and the comment that it has if we made it.
#[derive(Clone, Copy, Debug)]
pub struct MarkedTable {
    pub family: IpFamily,
    pub name: &'static str,
    pub comment: &'static str,
}

impl IpFamily {
    /// `NFPROTO_IPV4`, `NFPROTO_IPV6`.
    fn number(self) -> u8 {
        match self {
            IpFamily::V4 => 2,
            IpFamily::V6 => 10,
        }
    }
}

impl MarkedTable {
    /// Makes it; false where there is one of this name, with the comment or without.
    pub fn make(&self, socket: &NetlinkSocket) -> io::Result<bool> {
        if self.user_data(socket)?.is_some() {
            return Ok(false);
        }
        let mut batch = self.batch(message(BATCH_BEGIN, NLM_F_REQUEST, &batch_header()));
        let mut body = Vec::new();
        attribute(&mut body, NAME, &text(self.name));
        attribute(&mut body, USER_DATA, &self.mark());
        batch.add(NEW_TABLE, NLM_F_CREATE | NLM_F_EXCL, &body);
        match batch.commit(socket) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            other => other.map(|()| true),
        }
    }

    /// Removes it if it has the comment, and nothing in it that does anything: no rule, set or chain but those
    /// of hooks, which accept. Gives whether it was removed.
    pub fn remove_unused(&self, socket: &NetlinkSocket) -> io::Result<bool> {
        for _ in 0..ATTEMPTS {
            let generation = generation(socket)?;
            if self.user_data(socket)? != Some(self.mark()) || self.is_used(socket)? {
                return Ok(false);
            }
            // The kernel refuses the batch if anything was changed since.
            let mut begin = batch_header().to_vec();
            attribute(&mut begin, 1, &generation.to_be_bytes());
            let mut batch = self.batch(message(BATCH_BEGIN, NLM_F_REQUEST, &begin));
            let mut body = Vec::new();
            attribute(&mut body, NAME, &text(self.name));
            batch.add(DELETE_TABLE, 0, &body);
            match batch.commit(socket) {
                Err(error) if error.raw_os_error() == Some(libc::ERESTART) => {}
                other => return other.map(|()| true),
            }
        }
        Ok(false)
    }

    fn batch(&self, bytes: Vec<u8>) -> Batch {
        Batch {
            family: self.family.number(),
            bytes,
            count: 0,
        }
    }

    /// The comment as `nft` has it in the data of a table: type 0, length, text.
    fn mark(&self) -> Vec<u8> {
        let comment = text(self.comment);
        let mut data = vec![0, comment.len() as u8];
        data.extend_from_slice(&comment);
        data
    }

    /// The data of the table; `None` where there is none of this name.
    fn user_data(&self, socket: &NetlinkSocket) -> io::Result<Option<Vec<u8>>> {
        let mut found = None;
        self.each(socket, GET_TABLE, |object| {
            found = Some(value(object, USER_DATA).unwrap_or_default().to_vec());
        })?;
        Ok(found)
    }

    fn is_used(&self, socket: &NetlinkSocket) -> io::Result<bool> {
        const HOOK: u16 = 4;
        const POLICY: u16 = 5;
        let mut used = false;
        self.each(socket, GET_CHAIN, |chain| {
            let accepts = value(chain, POLICY) == Some(&NF_ACCEPT.to_be_bytes()[..]);
            used |= value(chain, HOOK).is_none() || !accepts;
        })?;
        for kind in [GET_RULE, GET_SET] {
            self.each(socket, kind, |_| used = true)?;
        }
        Ok(used)
    }

    /// Calls `take` with the attributes of each object of a kind that is in the table, or is the table.
    fn each(
        &self,
        socket: &NetlinkSocket,
        kind: u16,
        mut take: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        let header = [self.family.number(), 0, 0, 0];
        socket.dump(SUBSYSTEM << 8 | kind, &header, |body| {
            let object = body.get(4..).unwrap_or_default();
            // The name of the table is the first attribute of each.
            if body.first() == Some(&self.family.number())
                && value(object, NAME) == Some(&text(self.name)[..])
            {
                take(object);
            }
            Ok(())
        })
    }
}

/// Which version of all tables there is.
fn generation(socket: &NetlinkSocket) -> io::Result<u32> {
    let answer = socket.ask(SUBSYSTEM << 8 | GET_GENERATION, &[0; 4])?;
    let number = value(answer.get(4..).unwrap_or_default(), 1);
    let number = number.and_then(|number| number.try_into().ok());
    Ok(u32::from_be_bytes(
        number.ok_or(io::ErrorKind::InvalidData)?,
    ))
}

fn value(object: &[u8], wanted: u16) -> Option<&[u8]> {
    const NESTED: u16 = 0x8000;
    let mut found = attributes(object).filter(|(kind, _)| kind & !NESTED == wanted);
    found.next().map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nftables::Lifetime;

    #[test]
    fn only_an_unused_table_of_ours_is_removed() {
        // In a network of our own, on a thread of our own.
        std::thread::spawn(|| {
            if let Err(error) = crate::namespace::unshare(libc::CLONE_NEWNET.cast_unsigned()) {
                return eprintln!("skipped: {error}");
            }
            let socket = NetlinkSocket::open(libc::NETLINK_NETFILTER).expect("opened");
            let table = MarkedTable {
                family: IpFamily::V4,
                name: "filter",
                comment: "of a test",
            };
            match table.make(&socket) {
                Err(error) => return eprintln!("skipped: {error}"),
                Ok(made) => assert!(made),
            }
            assert!(!table.make(&socket).expect("asked"), "it is there");
            let mut batch = table.batch(message(BATCH_BEGIN, NLM_F_REQUEST, &batch_header()));
            batch.chain("filter", "INPUT", 1);
            batch.rule("filter", "INPUT", &crate::nftables::pass_marked());
            batch.commit(&socket).expect("a rule");
            assert!(
                !table.remove_unused(&socket).expect("asked"),
                "it has a rule"
            );
            let other = MarkedTable {
                comment: "other",
                ..table
            };
            assert!(
                !other.remove_unused(&socket).expect("asked"),
                "it is another's"
            );
            let mut batch = table.batch(message(BATCH_BEGIN, NLM_F_REQUEST, &batch_header()));
            let mut body = Vec::new();
            attribute(&mut body, 1, &text("filter"));
            batch.add(8, 0, &body);
            batch.commit(&socket).expect("no rules");
            assert!(table.remove_unused(&socket).expect("asked"));
            let mut batch = table.batch(message(BATCH_BEGIN, NLM_F_REQUEST, &batch_header()));
            batch.table("filter", Lifetime::Persistent);
            batch.commit(&socket).expect("one without a comment");
            assert!(!table.remove_unused(&socket).expect("asked"));
        })
        .join()
        .expect("no assertion failed");
    }
}
