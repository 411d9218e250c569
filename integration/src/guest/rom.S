# The guest: the last 4 KiB of a 64 KiB BIOS, at F000:F000. `guest::Params` writes the parameters
# over its first words, `guest::check` reads the control block that it keeps in RAM.
#
# It runs in real mode with 4 GiB segment limits ("unreal mode"): a KVM that interprets guests
# outside long mode knows no `iret` in protected mode.
#
# Registers that live from tick to tick:
#   ebx  ticks so far          ebp  page writes so far (the version of the latest write)
#   edi  address of the next page     ecx  its number       esi  16.16 fraction of a page owed

.set ORIGIN,   0xf000           # offset of this blob within its segment
.set TAG,      0x4d555354       # "MUST"
.set CONTROL,  0x1000           # the control block
.set MAGIC,    CONTROL
.set TICKS,    CONTROL + 4
.set WRITES,   CONTROL + 8
.set NEXT,     CONTROL + 12
.set OWED,     CONTROL + 16
.set LEFT,     CONTROL + 20     # ticks left in this phase
.set PHASE,    CONTROL + 24     # 1: writing, 0: quiet
.set LCG,      CONTROL + 28
.set LIMIT,    CONTROL + 32     # address behind the working set
.set D_BEGUN,  CONTROL + 36     # disk writes begun: the number of the latest
.set D_DONE,   CONTROL + 40     # disk writes that the disk has acknowledged
.set D_BLOCK,  CONTROL + 44     # block of the next disk write
.set D_OWED,   CONTROL + 48     # 16.16 fraction of a disk write owed
.set D_FAILED, CONTROL + 52     # disk writes that failed, and were begun again
.set B_TAKEN,  CONTROL + 56     # pages in the balloon: the last ones of its RAM
.set PARAMS,   CONTROL + 64     # copy of the parameters
.set P_END,    PARAMS + 0       # first page number behind RAM
.set P_BASE,   PARAMS + 4       # first page of the working set
.set P_PAGES,  PARAMS + 8       # pages of the working set
.set P_RATE,   PARAMS + 12      # pages per tick, 16.16
.set P_ON,     PARAMS + 16      # ticks writing
.set P_OFF,    PARAMS + 20      # ticks quiet; 0: always writing
.set P_RANDOM, PARAMS + 24      # 0: sweep, 1: random pages
.set P_PIT,    PARAMS + 28      # divisor of 1 193 182 Hz
.set P_BLOCKS, PARAMS + 32      # 4 KiB blocks of the disk; 0: there is none
.set P_DRATE,  PARAMS + 36      # disk writes per tick, 16.16; at most one
.set P_BALLOON, PARAMS + 40     # 1: there is a virtio-balloon device at 0:5.0
.set P_COUNT,  11
.set PRD,      0x1800           # where the disk finds it
.set BUFFER,   0x2000           # a block on its way to the disk
.set BM,       0xc000           # the bus master's registers
.set PFNS,     0x3000           # numbers of the pages that go into the balloon
.set STATS,    0x3800           # what is told of the memory
.set INFLATE,  0x10000          # virtqueue 0: descriptors, available ring, used ring
.set STATQ,    0x20000          # virtqueue 2
.set AVAIL,    0x1900           # where in a queue its available ring is,
.set USED,     0x1904           # and its used one
.set VB,       0xc100           # the balloon's registers (legacy virtio)
.set AT_ONCE,  256              # pages that change hands in a tick
.set FIRST,    256              # first tagged page: RAM above 1 MiB
.set STACK,    0x0c00

    .section .rodata.muster_rom, "a", @progbits
    .globl muster_rom_start
    .globl muster_rom_end
    .p2align 4
muster_rom_start:
    .code16
rom_params:
    .fill P_COUNT, 4, 0

    .p2align 3
rom_gdt:
    .quad 0
    .quad 0x00cf93000000ffff    # flat, writable, accessed
rom_gdtr:
    .word 15
    .long 0xf0000 + ORIGIN + (rom_gdt - muster_rom_start)

rom_entry:
    cli
    cld
    .byte 0x2e, 0x66, 0x0f, 0x01, 0x16  # lgdtl %cs:rom_gdtr
    .word ORIGIN + (rom_gdtr - muster_rom_start)
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    jmp 1f
1:  movw $8, %dx
    movw %dx, %ds
    movw %dx, %es
    andb $0xfe, %al
    movl %eax, %cr0
    .byte 0xea                          # ljmpw $0xf000, $1f
    .word ORIGIN + (1f - muster_rom_start)
    .word 0xf000
1:  xorw %ax, %ax
    movw %ax, %ds                       # bases 0, limits stay 4 GiB
    movw %ax, %es
    movw %ax, %ss
    movl $STACK, %esp

    # Local APIC: on, the PIC's interrupts through LINT0.
    movl $0xfee00000, %edi
    movl $0x1ff, 0xf0(%edi)
    movl $0x700, 0x350(%edi)

    # PICs: vectors from 0x20, only IRQ 0 let through.
    movb $0x11, %al
    outb %al, $0x20
    outb %al, $0xa0
    movb $0x20, %al
    outb %al, $0x21
    movb $0x28, %al
    outb %al, $0xa1
    movb $4, %al
    outb %al, $0x21
    movb $2, %al
    outb %al, $0xa1
    movb $1, %al
    outb %al, $0x21
    outb %al, $0xa1
    movb $0xfe, %al
    outb %al, $0x21
    movb $0xff, %al
    outb %al, $0xa1
    movw $(ORIGIN + (rom_tick - muster_rom_start)), 0x80
    movw $0xf000, 0x82

    # Parameters to RAM.
    xorl %esi, %esi
    movw $(ORIGIN + (rom_params - muster_rom_start)), %si
    movl $PARAMS, %edi
    movl $P_COUNT, %ecx
1:  movl %cs:(%esi), %eax
    movl %eax, (%edi)
    addl $4, %esi
    addl $4, %edi
    decl %ecx
    jnz 1b

    # Tag all pages with version 0, sixteen at a time: version 0 ^ page ^ TAG at offset 4. The
    # version itself is there: fresh RAM is zero.
    movl $FIRST, %ecx
    movl $(FIRST * 4096), %edi
    movl P_END, %ebx
2:  movl %ecx, %edx
    xorl $TAG, %edx
    .set page, 0
    .rept 16
    movl %edx, (page * 4096 + 4)(%edi)
    xorl $(page ^ (page + 1)), %edx
    .set page, page + 1
    .endr
    addl $0x10000, %edi
    addl $16, %ecx
    cmpl %ebx, %ecx
    jb 2b

    # State.
    movl P_ON, %eax
    movl %eax, LEFT
    movl $1, PHASE
    movl P_BASE, %ecx
    movl %ecx, %edi
    shll $12, %edi
    movl P_PAGES, %eax
    shll $12, %eax
    addl %edi, %eax
    movl %eax, LIMIT
    xorl %ebx, %ebx
    xorl %ebp, %ebp
    xorl %esi, %esi

    # The disk: no interrupts; the IDE function of the PIIX (0:1.1) masters the bus, its registers
    # are at BM.
    cmpl $0, P_BLOCKS
    je 1f
    movw $0x3f6, %dx
    movb $2, %al
    outb %al, %dx
    movw $0xcf8, %dx
    movl $0x80000920, %eax
    outl %eax, %dx
    movw $0xcfc, %dx
    movl $(BM | 1), %eax
    outl %eax, %dx
    movw $0xcf8, %dx
    movl $0x80000904, %eax
    outl %eax, %dx
    movw $0xcfc, %dx
    movw $5, %ax
    outw %ax, %dx
    movl $BUFFER, PRD
    movl $0x80001000, PRD + 4           # 4096 bytes, the last entry
    movw $(BM + 4), %dx
    movl $PRD, %eax
    outl %eax, %dx
1:
    # The balloon: no interrupts; of its features the statistics.
    cmpl $0, P_BALLOON
    je 1f
    movw $0xcf8, %dx
    movl $0x80002810, %eax
    outl %eax, %dx
    movw $0xcfc, %dx
    movl $(VB | 1), %eax
    outl %eax, %dx
    movw $0xcf8, %dx
    movl $0x80002804, %eax
    outl %eax, %dx
    movw $0xcfc, %dx
    movw $5, %ax
    outw %ax, %dx
    movw $(VB + 18), %dx
    xorb %al, %al
    outb %al, %dx
    movb $3, %al                        # acknowledged, with a driver
    outb %al, %dx
    movw $(VB + 4), %dx
    movl $2, %eax
    outl %eax, %dx
    movw $(VB + 14), %dx
    xorw %ax, %ax
    outw %ax, %dx
    movw $(VB + 8), %dx
    movl $(INFLATE >> 12), %eax
    outl %eax, %dx
    movw $(VB + 14), %dx
    movw $2, %ax
    outw %ax, %dx
    movw $(VB + 8), %dx
    movl $(STATQ >> 12), %eax
    outl %eax, %dx
    movw $(VB + 12), %dx
    xorl %eax, %eax
    inw %dx, %ax                        # how long the queues are
    shll $4, %eax
    movl %eax, AVAIL
    movl %eax, %edx
    shrl $3, %edx
    leal 4096 + 5(%eax, %edx), %eax
    andl $0xfffff000, %eax
    movl %eax, USED
    pushl %edi
    movl $INFLATE, %edi
    movl $PFNS, (%edi)
    addl AVAIL, %edi
    movw $1, (%edi)
    movl $STATQ, %edi
    movl $STATS, (%edi)
    movl $20, 8(%edi)
    addl AVAIL, %edi
    movw $1, (%edi)
    popl %edi
    movw $(VB + 18), %dx
    movb $7, %al
    outb %al, %dx
1:
    # PIT channel 0, mode 2.
    movb $0x34, %al
    outb %al, $0x43
    movl P_PIT, %eax
    outb %al, $0x40
    movb %ah, %al
    outb %al, $0x40
    movl $TAG, MAGIC
    sti
3:  hlt
    jmp 3b

# One tick: a byte out, then this tick's share of page writes.
rom_tick:
    movb %bl, %al
    outb %al, $0xe9
    incl %ebx
    movl %ebx, TICKS
    movb $0x20, %al
    outb %al, $0x20
    cmpl $0, P_BLOCKS
    je 1f
    call rom_disk
1:  cmpl $0, P_BALLOON
    je 1f
    call rom_balloon
1:  cmpl $0, P_OFF
    je rom_write
    decl LEFT
    jnz 1f
    xorl $1, PHASE
    movl P_ON, %eax
    cmpl $0, PHASE
    jne 2f
    movl P_OFF, %eax
2:  movl %eax, LEFT
1:  cmpl $0, PHASE
    je rom_done
rom_write:
    addl P_RATE, %esi
    movl %esi, %edx
    andl $0xffff, %esi
    movl %esi, OWED
    shrl $16, %edx
    jz rom_done
    addl %ebp, %edx                     # write until this version
    cmpl $0, P_RANDOM
    jne rom_random
rom_sweep:
    incl %ebp
    movl %ebp, (%edi)
    movl %ebp, %eax
    xorl %ecx, %eax
    xorl $TAG, %eax
    movl %eax, 4(%edi)
    movl %ebp, WRITES
    incl %ecx
    addl $4096, %edi
    cmpl LIMIT, %edi
    je rom_wrap
4:  cmpl %edx, %ebp
    jne rom_sweep
    movl %ecx, NEXT
rom_done:
    iretw
rom_wrap:
    movl P_BASE, %ecx
    movl %ecx, %edi
    shll $12, %edi
    jmp 4b

rom_random:
    imull $1664525, LCG, %eax
    addl $1013904223, %eax
    movl %eax, LCG
    pushl %edx
    mull P_PAGES                        # edx = working set * state / 2^32
    movl %edx, %ecx
    popl %edx
    addl P_BASE, %ecx
    movl %ecx, %edi
    shll $12, %edi
    incl %ebp
    movl %ebp, (%edi)
    movl %ebp, %eax
    xorl %ecx, %eax
    xorl $TAG, %eax
    movl %eax, 4(%edi)
    movl %ebp, WRITES
    cmpl %edx, %ebp
    jne rom_random
    iretw

# The disk at the first IDE channel, one write of 4 KiB at a time, by DMA: the next block gets the
# number of the write and the number ^ block ^ TAG, at its beginning and again at its end.
rom_disk:
    movl D_BEGUN, %eax
    cmpl D_DONE, %eax
    je 2f                               # nothing is under way
    movw $0x1f7, %dx
    inb %dx, %al
    testb $0x88, %al
    jnz 9f                              # busy, or transferring
    testb $0x21, %al
    jz 1f
    incl D_FAILED
    decl D_BEGUN
    jmp 2f
1:  movl D_BEGUN, %eax
    movl %eax, D_DONE                   # acknowledged
    movl D_BLOCK, %eax
    incl %eax
    cmpl P_BLOCKS, %eax
    jb 1f
    xorl %eax, %eax
1:  movl %eax, D_BLOCK
2:  movl P_DRATE, %eax
    addl %eax, D_OWED
    cmpl $0x10000, D_OWED
    jb 9f
    subl $0x10000, D_OWED
    pushl %ecx
    incl D_BEGUN
    movl D_BEGUN, %eax
    movl D_BLOCK, %ecx
    movl %eax, BUFFER
    movl %eax, BUFFER + 4088
    xorl %ecx, %eax
    xorl $TAG, %eax
    movl %eax, BUFFER + 4
    movl %eax, BUFFER + 4092
    shll $3, %ecx                       # its first sector
    movw $0x1f2, %dx
    movb $8, %al
    outb %al, %dx
    incw %dx
    movb %cl, %al
    outb %al, %dx
    incw %dx
    movb %ch, %al
    outb %al, %dx
    shrl $16, %ecx
    incw %dx
    movb %cl, %al
    outb %al, %dx
    incw %dx
    movb %ch, %al
    andb $0x0f, %al
    orb $0xe0, %al
    outb %al, %dx
    incw %dx
    movb $0xca, %al                     # WRITE DMA
    outb %al, %dx
    movw $BM, %dx
    xorb %al, %al
    outb %al, %dx
    incb %al
    outb %al, %dx                       # start
    popl %ecx
9:  ret

# The balloon: one request at a time, from the end of RAM down to the working set. A page that comes
# back is tagged anew, as one that was never written.
rom_balloon:
    pushal
    movl AVAIL, %esi
    movl USED, %edi
    movw STATQ + 2(%edi), %ax
    cmpw STATQ + 2(%esi), %ax
    jne 1f
    call rom_stats                      # the host wants new ones
1:  movw INFLATE + 2(%edi), %ax
    cmpw INFLATE + 2(%esi), %ax
    jne 9f                              # not taken yet
    movw $(VB + 20), %dx
    inl %dx, %eax                       # so many pages it is to have
    movl B_TAKEN, %ecx
    cmpl %ecx, %eax
    je 9f
    jb 5f
    subl %ecx, %eax
    cmpl $AT_ONCE, %eax
    jbe 2f
    movl $AT_ONCE, %eax
2:  movl P_END, %ebx
    subl %ecx, %ebx
    movl %ebx, %edx
    subl P_BASE, %edx
    subl P_PAGES, %edx
    cmpl %edx, %eax
    jbe 3f
    movl %edx, %eax
3:  testl %eax, %eax
    jz 9f
    addl %eax, B_TAKEN
    movl %eax, %ecx
    shll $2, %eax
    movl $INFLATE, %edi
    movl %eax, 8(%edi)
    movl $PFNS, %edi
4:  decl %ebx
    movl %ebx, (%edi)
    addl $4, %edi
    decl %ecx
    jnz 4b
    incw INFLATE + 2(%esi)
    movw $(VB + 16), %dx
    xorw %ax, %ax
    outw %ax, %dx
    jmp 8f
5:  subl %eax, %ecx
    cmpl $AT_ONCE, %ecx
    jbe 6f
    movl $AT_ONCE, %ecx
6:  movl P_END, %ebx
    subl B_TAKEN, %ebx
    subl %ecx, B_TAKEN
7:  movl %ebx, %edi
    shll $12, %edi
    movl $0, (%edi)
    movl %ebx, %edx
    xorl $TAG, %edx
    movl %edx, 4(%edi)
    incl %ebx
    decl %ecx
    jnz 7b
8:  movw $(VB + 24), %dx
    movl B_TAKEN, %eax
    outl %eax, %dx
9:  popal
    ret

# Total and available memory: all that is not in the balloon, and of that what it never writes.
rom_stats:
    movl P_END, %eax
    subl B_TAKEN, %eax
    movl %eax, %edx
    subl P_BASE, %edx
    subl P_PAGES, %edx
    shll $12, %eax
    shll $12, %edx
    movw $5, STATS
    movl %eax, STATS + 2
    movw $6, STATS + 10
    movl %edx, STATS + 12
    incw STATQ + 2(%esi)
    movw $(VB + 16), %dx
    movw $2, %ax
    outw %ax, %dx
    ret

    .org muster_rom_start + 0xff0, 0xf4
    .byte 0xea                          # ljmpw $0xf000, $rom_entry
    .word ORIGIN + (rom_entry - muster_rom_start)
    .word 0xf000
    .org muster_rom_start + 0x1000, 0
muster_rom_end:
    .code64
    .previous
